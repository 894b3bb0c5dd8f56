"""Is this machine ready? Versions, devices, cores, memory, disk, sandbox layers and the embedded model.

`examine` gathers, `doctor_command` prints. A missing mandatory part is a problem with what to do about it, and makes
the exit code 1; everything else is only shown. It measures nothing (that is `azr-jax bench`) and changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from azr_jax.executor.sizing import cgroup_folders, cpu_quota, read_text

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "sentencepiece", "numpy", "safetensors",
)  # fmt: skip
EMBEDDED_MODEL = Path(__file__).parent / "models" / "embedded"
MIN_FREE_MEMORY_GB = 2.0  # a rough floor for the demo: JAX, a small model, workers
MIN_FREE_DISK_GB = 1.0  # a rough floor for a demo run with its checkpoints


def doctor_command(as_json: bool) -> int:
    """Print the findings as a table or as one JSON object; 0 if this machine is ready, else 1."""
    findings = examine()
    sys.stdout.write(json.dumps(findings) + "\n" if as_json else render(findings))
    return 0 if findings["ok"] else 1


def examine() -> dict[str, Any]:
    """All findings as a JSON-able dict: `ok`, `problems` (what is missing and what to do), then one entry a topic."""
    problems: list[str] = []
    findings: dict[str, Any] = {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "cores": _cores(),
        "memory": _memory(problems),
        "disk": _disk(problems),
        "sandbox": _sandbox(problems),
        "embedded_model": _embedded_model(problems),
    }
    return {"ok": not problems, "problems": problems, **findings}


def render(findings: dict[str, Any]) -> str:
    """The findings as aligned lines, problems last."""
    lines = []
    for topic, value in findings.items():
        if topic not in ("ok", "problems"):
            lines += [f"{name:<28} {text}" for name, text in _rows(topic.replace("_", " "), value)]
    lines.append("")
    lines += [f"problem: {problem}" for problem in findings["problems"]] or ["ready"]
    return "\n".join(lines) + "\n"


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """(name, text) of a finding; a dict or list gives one row for each of its entries."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _rows(f"{name} {key}", entry)
    elif isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield from _rows(f"{name} {index}", entry)
    else:
        yield name, {"True": "yes", "False": "no", "None": "-", "[]": "-", "{}": "-"}.get(str(value), str(value))


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Versions of Python and of the packages; None is a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed; pip install -r requirements.txt")
    return versions


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    """One entry for each kind of device JAX sees: platform, kind, count and memory of one (GiB, None if unknown)."""
    try:
        import jax

        found: dict[tuple[str, str], list[Any]] = {}
        for device in jax.devices():
            found.setdefault((device.platform, device.device_kind), []).append(device)
        return [
            {"platform": name, "kind": kind, "count": len(group), "memory_gb": _device_memory(group[0])}
            for (name, kind), group in found.items()
        ]
    except Exception as error:  # a broken driver can raise anything, and the other findings still matter
        problems.append(f"JAX finds no devices ({_first_line(error)}); JAX_PLATFORMS=cpu runs on the processor")
        return []


def _device_memory(device: Any) -> float | None:
    """Memory limit of a device in GiB; CPU devices report none."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else round(limit / 2**30, 1)


def _cores() -> dict[str, Any]:
    """Cores of the machine, those this process may use, and its cgroup's quota (None: none)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": os.cpu_count(), "usable": usable, "quota": cpu_quota()}


def free_memory(
    cgroup: Path = Path("/sys/fs/cgroup"),
    process: Path = Path("/proc/self/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
) -> float | None:
    """Bytes this process can still take: what the system has available, or less where a cgroup says so."""
    free = [
        int(line.split()[1]) * 1024.0 for line in read_text(meminfo).splitlines() if line.startswith("MemAvailable:")
    ]
    for folder in cgroup_folders(cgroup, process, "memory"):
        limit, used, cache = read_text(folder / "memory.max"), read_text(folder / "memory.current"), "inactive_file"
        if not limit:
            limit, used = read_text(folder / "memory.limit_in_bytes"), read_text(folder / "memory.usage_in_bytes")
            cache = "total_inactive_file"
        if limit.isdecimal() and used.isdecimal():
            counters = dict(line.split(" ", 1) for line in read_text(folder / "memory.stat").splitlines())
            reclaimable = int(counters.get(cache, 0))  # file cache counts as used but is given up on demand
            free.append(max(0.0, int(limit) - int(used) + reclaimable))
    return min(free, default=None)


def _memory(problems: list[str]) -> dict[str, float | None]:
    """Memory still free for this process, in GiB."""
    free = free_memory()
    gigabytes = None if free is None else round(free / 2**30, 1)
    if gigabytes is not None and gigabytes < MIN_FREE_MEMORY_GB:
        problems.append(f"only {gigabytes} GiB of memory are free; the demo needs {MIN_FREE_MEMORY_GB:g}")
    return {"free_gb": gigabytes}


def _disk(problems: list[str]) -> dict[str, Any]:
    """Free disk where runs are written by default (the working folder), in GiB."""
    folder = Path.cwd()
    gigabytes = math.floor(shutil.disk_usage(folder).free / 2**30 * 10) / 10
    if gigabytes < MIN_FREE_DISK_GB:
        problems.append(f"only {gigabytes} GiB are free in {folder}; set run_dir to a folder with more")
    if not os.access(folder, os.W_OK):
        problems.append(f"{folder} is not writable; set run_dir to a folder that is")
    return {"folder": str(folder), "free_gb": gigabytes}


def _sandbox(problems: list[str]) -> dict[str, bool]:
    """Layer of the executor's sandbox -> whether it holds here; a mandatory one that does not is a problem."""
    try:
        from azr_jax.executor import sandbox_layers
        from azr_jax.executor.lockdown import MANDATORY

        layers = dict(sandbox_layers())
    except Exception as error:  # whatever keeps the sandbox from being examined also keeps programs from running
        problems.append(f"the sandbox cannot be examined ({_first_line(error)}); no program can be run here")
        return {}
    missing = [name for name in MANDATORY if not layers.get(name)]
    if missing:
        problems.append(
            f"mandatory sandbox layers do not hold here: {', '.join(missing)}; use a newer Linux kernel or another "
            "container profile, or accept the risk with executor.allow_weaker_sandbox=true"
        )
    return layers


def _embedded_model(problems: list[str]) -> dict[str, Any]:
    """Whether the package's own model is there, and its size in MB."""
    files = {path.name: path.stat().st_size for path in EMBEDDED_MODEL.glob("*")} if EMBEDDED_MODEL.is_dir() else {}
    present = "config.json" in files and any(name.endswith(".safetensors") for name in files)
    if not present:
        problems.append(f"the embedded model is missing in {EMBEDDED_MODEL}; `make model` rebuilds it")
    return {"present": present, "path": str(EMBEDDED_MODEL), "size_mb": round(sum(files.values()) / 1e6, 2)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
