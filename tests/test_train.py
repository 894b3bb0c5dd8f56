"""A run as a user sees it: its folder, kill and resume bit for bit, signals, mistakes. Every run is its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from azr_jax.checkpoint import Checkpointer
from azr_jax.config import ExecutorConfig
from azr_jax.config_loader import load_config
from azr_jax.executor import ExecutorPool
from azr_jax.telemetry import metrics
from azr_jax.telemetry.metrics import unknown_names
from azr_jax.train import Run, with_prompts

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/debug_cpu.yaml")
SMALL = ["tasks.seed_factor=1", "executor.workers=1", "eval.every=2", "eval.per_kind=4", "checkpoint.every=2"]


def command(run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "azr_jax", "train", CONFIG, f"run_dir={run_dir}", *SMALL, *overrides]


def start(run_dir: Path, *overrides: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # one device: compiles faster
    environment["JAX_COMPILATION_CACHE_DIR"] = str(run_dir.parent / "compiled")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [*before, *command(run_dir, *overrides)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=400)
    return process.returncode, errors


def rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 400
    while not any(row["step"] >= step for row in rows(run_dir)):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)


def repeatable(run_dir: Path) -> list[dict]:
    return [metrics.repeatable(row) for row in rows(run_dir)]


def arrays(run_dir: Path) -> tuple[int, list[np.ndarray], dict]:
    """Step, every array and the JSON part of the newest checkpoint."""
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        state = Run(*with_prompts(load_config(run_dir / "config.yaml", [])), pool).fresh_state()
    restored = Checkpointer(run_dir / "checkpoints", 3).restore(state)
    assert restored is not None
    step, state, extra = restored
    return step, [np.asarray(x) for x in jax.tree.leaves(state)], extra


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(a run of 4 steps, the same run killed after step 3 and resumed from step 2, what the resumed one logged)."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    process = start(killed, "steps=4")
    wait_for_step(process, killed, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Checkpointer(killed / "checkpoints", 3).latest() == 2
    code, log = finish(start(killed, "steps=4"))
    assert code == 0, log
    code, whole_log = finish(start(whole, "steps=4"))
    assert code == 0, whole_log
    return whole, killed, log


def test_kill_and_resume_is_exact(runs: tuple[Path, Path, str]) -> None:
    whole, killed, log = runs
    assert "resuming after step 2" in log
    assert repeatable(whole) == repeatable(killed)
    assert [row["step"] for row in rows(killed)] == [0, 1, 2, 3, 4]
    for name in ("tasks.jsonl", "oversight.jsonl", *(f"rollouts/step_{n:06d}.jsonl" for n in range(1, 5))):
        paths = [folder / name for folder in (whole, killed)]
        assert paths[0].exists() == paths[1].exists()
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes(), name
    (step, expected, extra), (other_step, found, other_extra) = arrays(whole), arrays(killed)
    assert step == other_step == 4
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    assert extra == other_extra and extra["buffers"]
    assert extra["skipped"] == 0 and extra["unfinished"] is None


def test_the_run_folder_is_complete(runs: tuple[Path, Path, str]) -> None:
    whole, _, _ = runs
    for name in ("config.yaml", "metrics.jsonl", "tasks.jsonl", "rollouts/step_000004.jsonl", "report.html"):
        assert (whole / name).stat().st_size > 0
    for row in rows(whole):
        assert unknown_names(row) == []
    last = rows(whole)[-1]
    assert last["learner/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert last["learner/logp_gap_max"] < 1e-4
    assert last["learner/clip_low"] == last["learner/clip_high"] == 0
    assert last["learner/skipped"] == 0 and last["learner/update_norm"] > 0
    assert {"eval/sampled/pooled", "eval/gain/greedy/pooled_low"} <= last.keys()
    rollout = json.loads((whole / "rollouts/step_000001.jsonl").read_text().splitlines()[0])
    assert {"step", "role", "kind", "prompt", "response", "verdict", "reward"} <= rollout.keys()


def test_nothing_compiles_once_every_shape_has_been_seen(runs: tuple[Path, Path, str]) -> None:
    """Batches shrink through a short list of sizes, so late steps may still meet a first one, but only a few."""
    compiles = [row["perf/compiles"] for row in rows(runs[0]) if "perf/compiles" in row]
    assert compiles[-1] - compiles[1] <= 6


def test_a_full_disk_is_one_clear_line_and_loses_no_checkpoint(runs: tuple[Path, Path, str]) -> None:
    """A limit on the size of files stands in for it: rows still fit, a checkpoint does not."""
    whole, _, _ = runs
    code, log = finish(start(whole, "steps=6", before=("bash", "-c", 'ulimit -f 300; exec "$@"', "bash")))
    assert code == 1 and "cannot write a checkpoint" in log and "the checkpoint of step 4 is untouched" in log
    assert len([line for line in log.splitlines() if line.startswith("azr-jax:")]) == 1 and "Traceback" not in log
    assert Checkpointer(whole / "checkpoints", 3).latest() == 4


def test_more_steps_extend_a_finished_run_and_sigterm_saves(runs: tuple[Path, Path, str]) -> None:
    whole, _, _ = runs
    process = start(whole, "steps=400")
    wait_for_step(process, whole, 7)  # of which some are left by the run before
    process.terminate()
    code, log = finish(process)
    assert code == 0 and "resumable" in log and "resuming after step 4" in log
    last = rows(whole)[-1]["step"]
    assert last >= 7 and Checkpointer(whole / "checkpoints", 3).latest() == last


def test_a_changed_config_is_refused_in_one_line(runs: tuple[Path, Path, str]) -> None:
    _, killed, _ = runs
    before = (killed / "metrics.jsonl").read_bytes()
    code, log = finish(start(killed, "steps=4", "learn.lr=5e-4"))
    assert code == 2 and "learn.lr" in log and "--allow-config-change" in log
    assert "Traceback" not in log and (killed / "metrics.jsonl").read_bytes() == before


def test_a_torn_newest_checkpoint_costs_only_the_steps_since_the_one_before(runs: tuple[Path, Path, str]) -> None:
    _, killed, _ = runs
    newest = killed / "checkpoints" / "step_000004"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = repeatable(killed)
    code, log = finish(start(killed, "steps=4"))
    assert code == 0 and "skipping checkpoint" in log and "resuming after step 2" in log
    assert repeatable(killed) == before


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["learn.leraning_rate=1"], 2, "unknown key"),
        (["model=/nowhere/at/all"], 2, "no such folder"),
        (["run_dir=/proc/no/such/place"], 1, "/proc/no/such/place"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, overrides: list[str], code: int, says: str) -> None:
    found, log = finish(start(tmp_path / "run", *overrides))
    assert found == code and says in log and "Traceback" not in log
    assert len([line for line in log.splitlines() if line.startswith("azr-jax:")]) == 1
