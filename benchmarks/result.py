"""How a benchmark's result is written: with what is needed to judge it and to get it again."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu")


def about(machine: str = "") -> dict[str, Any]:
    """Date, command (without `--out`), machine (what is said of it, besides its cores) and versions of this process."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    installed = {each.name for each in metadata.distributions()}
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "machine": f"{os.cpu_count()} cores {platform.machine()}" + (f", {machine}" if machine else ""),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES if name in installed},
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """As indented JSON."""
    path.write_text(json.dumps(record, indent=1) + "\n")
