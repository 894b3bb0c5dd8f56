"""The scripts are sound bash, short, and print what docs/tpu.md shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tpu_scripts"
FILES = sorted(FOLDER.rglob("*.sh"))
SOURCED = {FOLDER / "settings.sh", FOLDER / "common.sh", FOLDER / "worker/common.sh"}
#: On PATH, or beside the interpreter, where pip puts it.
SHELLCHECK = shutil.which("shellcheck", path=f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}")
COMMANDS = sorted(path.name for path in FOLDER.glob("*.sh") if path not in SOURCED)


def transcripts() -> dict[str, str]:
    """Command line -> output, from the ```console blocks of docs/tpu.md."""
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / "docs/tpu.md").read_text(), re.DOTALL | re.MULTILINE)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return {command: output for command, _, output in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_files(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 65
    assert max(map(len, text.splitlines())) <= 120
    assert (path in SOURCED) != os.access(path, os.X_OK)
    assert text.startswith("# shellcheck shell=bash" if path in SOURCED else "#!/usr/bin/env bash\n# ")
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed; the extra `test` brings it on Linux")
def test_shellcheck():
    names = [str(path.relative_to(ROOT)) for path in FILES]
    done = subprocess.run([SHELLCHECK, "-x", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_has_a_transcript():
    assert {shlex.split(line)[0].removeprefix("tpu_scripts/") for line in transcripts()} == set(COMMANDS)
    assert all(line.endswith("--dry-run") for line in transcripts())


@pytest.mark.parametrize("command", sorted(transcripts()))
def test_transcripts(command):
    environment = {name: value for name, value in os.environ.items() if name != "TPU_SETTINGS"}
    done = subprocess.run(shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == transcripts()[command]


def test_settings_are_explained_and_the_docs_name_no_others():
    lines = [line for line in (FOLDER / "settings.sh").read_text().splitlines() if line[:1].isupper()]
    assert len(lines) > 10
    assert all(re.search(r"^[A-Z_]+=\S*\s+# \w", line) for line in lines)
    names = {line.partition("=")[0] for line in lines}
    page = (ROOT / "docs/tpu.md").read_text()
    settings_like = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)(?:=yes)?`", page))
    states = {"WAITING_FOR_RESOURCES", "FAILED", "SUSPENDED", "PREEMPTED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"}
    assert settings_like - states <= names
    assert {"CONFIG", "RUN_NAME", "MODEL", "CAPACITY", "SYNC_SECONDS", "DELETE_WHEN_DONE"} <= settings_like


def slurm_script(several: bool) -> str:
    """For several nodes: with what the page says to write instead."""
    page = (ROOT / "docs/gpu.md").read_text()
    found = re.search(r"^```bash\n(#!/bin/bash\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    trap = re.search(r"^  ```bash\n  (trap .*)\n  ```$", page, re.MULTILINE)
    assert found and trap
    if not several:
        return found[1]
    changed = re.sub("^trap .*$", trap[1], found[1], flags=re.MULTILINE)
    changed = changed.replace("\nazr-jax train", "\nsrun azr-jax train")
    assert changed.count("srun") == changed.count("scancel") == 1
    return changed


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("code", "requeued"), [(0, True), (3, False)])
def test_slurm_script_passes_the_signal_on_and_requeues(tmp_path, code, requeued, several):
    """Started as SLURM does, with a trainer that needs a moment to save; srun kills its tasks at a SIGTERM."""
    home = tmp_path / "azr_jax"
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/activate").write_text(f'PATH="{tmp_path}:$PATH"\n')
    ready = tmp_path / "ready"
    programs = {
        "azr-jax": f'trap "sleep 0.2; echo saved; exit {code}" TERM\ntouch "{ready}"\nwhile :; do sleep 0.02; done',
        "scontrol": 'echo "scontrol $*"',
        "srun": f'"$@" & echo $! >"{tmp_path}/task"\ntrap "kill -KILL $!; exit 143" TERM\nwait "$!"',
        "scancel": f'[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(cat "{tmp_path}/task")"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "azr.sbatch").write_text(slurm_script(several))
    environment = os.environ | {"HOME": str(tmp_path), "SCRATCH": str(tmp_path), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", tmp_path / "azr.sbatch"], env=environment, stdout=subprocess.PIPE, text=True)
    while not ready.exists() and job.poll() is None:
        time.sleep(0.02)
    job.terminate()
    output, _ = job.communicate(timeout=300)  # against a hang only
    assert job.returncode == code
    assert output == "saved\n" + ("scontrol requeue 7\n" if requeued else "")
