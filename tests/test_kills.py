"""A run that is killed and preempted again and again ends as one that nobody disturbed, bit for bit.

A short form of `python benchmarks/kills.py --kills 20 --terms 20 --steps 16 --seed 1`, which says how it is done.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_sigkill_and_sigterm_at_random_moments_change_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/kills.py", "--kills", "3", "--terms", "2", "--seed", "0"]
    command += ["--steps", "3", "--dir", str(tmp_path), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["differences"] == {"SIGKILL": [], "SIGTERM": []}
    for name, times in (("SIGKILL", 3), ("SIGTERM", 2)):
        assert 1 <= found[name]["times"] <= times and found[name]["during"]
        assert found[name]["processes_left"] == 0
