"""The run folder: locking, configuration guard, appends that survive kills and full disks, exact truncation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from azr_jax.errors import ConfigError, UserError
from azr_jax.telemetry.oversight import verify
from azr_jax.telemetry.run_folder import RunFolder, config_changes, read_rows

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_dump({"run_dir": "x", "steps": 4, "seed": 0, "learn": {"lr": 1e-3, "beta1": 0.9}})


def fill(folder: RunFolder, steps: range) -> None:
    for step in steps:
        folder.append_metrics(step, {"learner/loss": step / 7})
        folder.append_tasks(step, [{"kind": "deduction", "program": "p"}, {"kind": "induction", "message": "\ud800"}])
        folder.append_oversight([{"step": step, "flags": []}])
        folder.write_rollouts(step, [{"prompt": "q", "response": "\udfff\x00"}])


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.name != ".lock")
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in files}


def test_rows_come_back_and_hold_only_ascii(tmp_path):
    with RunFolder.open(tmp_path / "run", CONFIG) as folder:
        fill(folder, range(1, 3))
        folder.append_metrics(3, {"a/b": np.float32(0.5), "a/n": np.int64(7), "a/nan": float("nan"), "a/inf": np.inf})
        rows = folder.read_metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2] == {"step": 3, "a/b": 0.5, "a/n": 7, "a/nan": None, "a/inf": None}
    assert isinstance(rows[2]["a/n"], int)
    tasks = list(read_rows(tmp_path / "run/tasks.jsonl"))
    assert [task["step"] for task in tasks] == [1, 1, 2, 2] and tasks[1]["message"] == "\ud800"
    rollouts = list(read_rows(tmp_path / "run/rollouts/step_000002.jsonl"))
    assert rollouts == [{"prompt": "q", "response": "\udfff\x00", "step": 2}]
    for data in contents(tmp_path / "run").values():
        data.decode("ascii")


def test_truncation_leaves_what_an_uninterrupted_run_would_hold(tmp_path):
    with RunFolder.open(tmp_path / "whole", CONFIG) as folder:
        fill(folder, range(1, 5))
    path = tmp_path / "killed"
    with RunFolder.open(path, CONFIG) as folder:
        fill(folder, range(1, 4))
    for name in ("metrics.jsonl", "tasks.jsonl", "oversight.jsonl"):
        with (path / name).open("ab") as file:
            file.write(b'{"step": 4, "torn')
    (path / "rollouts/step_000004.jsonl.tmp").write_text("{")
    with RunFolder.open(path, CONFIG) as folder:
        folder.begin_after(2)
        fill(folder, range(3, 5))
    assert contents(path) == contents(tmp_path / "whole")
    assert verify(path / "oversight.jsonl").ok


def test_truncation_before_any_checkpoint_empties_the_run(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        fill(folder, range(0, 3))
        folder.begin_after(-1)
        assert folder.read_metrics() == []
        assert not list(folder.rollouts.iterdir())
        fill(folder, range(0, 1))
    assert verify(tmp_path / "oversight.jsonl").records == 1


def test_a_torn_line_that_is_whole_json_is_torn_nevertheless(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        fill(folder, range(1, 2))
        with folder.metrics.open("ab") as file:
            file.write(b'{"step": 1}')  # no newline: the write was cut
        assert len(folder.read_metrics()) == 1
        folder.begin_after(1)
        assert folder.metrics.read_bytes().endswith(b"}\n") and len(folder.read_metrics()) == 1


def test_changed_configuration_is_refused_by_name_of_key(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        fill(folder, range(1))
    changed = CONFIG.replace("0.001", "0.002").replace("beta1: 0.9\n", "").replace("seed: 0", "seed: 0\nnew: {a: 1}")
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(tmp_path, changed)
    message = str(caught.value)
    assert "learn.lr: 0.001 -> 0.002" in message
    assert "learn.beta1: 0.9 -> (not set)" in message and "new.a: (not set) -> 1" in message
    assert "run_dir" in message and "--allow-config-change" in message and str(tmp_path) in message
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    RunFolder.open(tmp_path, CONFIG).close()  # the lock of the refused attempt is gone


def test_a_start_that_came_to_nothing_binds_no_configuration(tmp_path):
    RunFolder.open(tmp_path, CONFIG + "model: /worng\n").close()
    RunFolder.open(tmp_path, CONFIG + "model: /right\n").close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"] == "/right"
    assert not (tmp_path / "config_changes.jsonl").exists()
    (tmp_path / "checkpoints/step_000000").mkdir(parents=True)
    with pytest.raises(ConfigError, match="model"):
        RunFolder.open(tmp_path, CONFIG + "model: /other\n")


def test_allowed_change_is_noted_and_more_steps_need_no_leave(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        fill(folder, range(1, 3))
    faster = CONFIG.replace("0.001", "0.002")
    for step, text, allowed in (
        (2, CONFIG.replace("steps: 4", "steps: 9").replace("run_dir: x", "run_dir: y"), False),
        (1, faster, True),
        (1, faster + "checkpoint: {keep: 1}\n", False),
    ):
        with RunFolder.open(tmp_path, text, allowed) as folder:
            folder.begin_after(step)
    notes = list(read_rows(tmp_path / "config_changes.jsonl"))
    assert notes[0]["changes"]["steps"] == {"old": 4, "new": 9}
    assert notes[1]["changes"]["learn.lr"] == {"old": 0.001, "new": 0.002} and notes[1]["step"] == 1
    assert notes[2]["changes"] == {"checkpoint.keep": {"old": None, "new": 1}}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learn"]["lr"] == 0.002


def test_unreadable_configuration_is_one_clear_line(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match="no readable YAML.*new run_dir") as caught:
        RunFolder.open(tmp_path, CONFIG)
    assert "\n" not in str(caught.value)


def test_config_changes_ignore_layout():
    assert config_changes("a: {b: 1, c: [1, 2]}", "a:\n  c: [1, 2]\n  b: 1\n", "x") == {}
    assert config_changes("a: 1", "a: {b: 2}", "x") == {"a.b": (None, 2), "a": (1, None)}


HOLDER = """
import sys, os, time
from azr_jax.telemetry.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1], sys.argv[2])
if os.fork() == 0:
    time.sleep(60)  # a worker that outlives the run
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_live_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), CONFIG],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"in use by a live run .process {holder.pid}"):
            RunFolder.open(tmp_path, CONFIG)
        holder.kill()  # not the forked worker
        holder.wait()
        RunFolder.open(tmp_path, CONFIG).close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout and holder.stdout.close()


def test_a_file_in_the_way_or_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/below", Path("/proc/azr_jax_run")):
        with pytest.raises(UserError, match="cannot write") as caught:
            RunFolder.open(path, CONFIG)
        assert str(path) in str(caught.value) and "run_dir" in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_a_clear_error(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.metrics.symlink_to("/dev/full")
        with pytest.raises(UserError, match="No space left on device.*resumes the run"):
            folder.append_metrics(1, {"a/b": 1.0})


def test_what_did_not_fit_is_cut_off_again(tmp_path, monkeypatch):
    """A disk that takes half of a row: the rows before stay whole, and the torn half goes."""
    code = """
import resource, signal, sys
from azr_jax.errors import UserError
from azr_jax.telemetry.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1], sys.argv[2])
folder.append_metrics(1, {"a/b": 1.0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    folder.append_metrics(2, {f"a/{i}": 1.0 for i in range(100)})
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), CONFIG], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout and "metrics.jsonl" in done.stdout
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps({"step": 1, "a/b": 1.0}) + "\n"


def test_an_oversight_record_needs_its_step(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder, pytest.raises(ValueError, match="without a step"):
        folder.append_oversight([{"flags": []}])


def test_the_chain_goes_on_over_a_restart(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.append_oversight([{"step": 1, "text": "\ud800"}, {"step": 1, "rate": 0.1}])
        folder.append_oversight([])
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.append_oversight([{"step": 2}])
        assert verify(folder.oversight, folder.oversight_head).records == 3


def test_a_change_that_came_to_nothing_is_no_change(tmp_path):
    """Of the model, say: no checkpoint goes with it, and the start ends there."""
    with RunFolder.open(tmp_path, CONFIG + "model: /a\n") as folder:
        fill(folder, range(1, 3))
    RunFolder.open(tmp_path, CONFIG + "model: /b\n", allow_config_change=True).close()
    RunFolder.open(tmp_path, CONFIG + "model: /a\n").close()
    assert not (tmp_path / "config_changes.jsonl").exists()


def test_more_steps_need_consent_where_the_learning_rate_decays_over_them(tmp_path):
    def yaml_text(steps: int, schedule: str) -> str:
        return f"steps: {steps}\nlearn:\n  schedule: {schedule}\n"

    for schedule, allowed in (("constant", True), ("linear", False)):
        path = tmp_path / schedule
        with RunFolder.open(path, yaml_text(10, schedule)) as folder:
            folder.append_metrics(1, {})
        if allowed:
            RunFolder.open(path, yaml_text(20, schedule)).close()
        else:
            with pytest.raises(ConfigError, match="steps: 10 -> 20"):
                RunFolder.open(path, yaml_text(20, schedule))
            RunFolder.open(path, yaml_text(20, schedule), allow_config_change=True).close()
