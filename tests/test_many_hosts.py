"""A run over several processes is the run that one process makes: the command as users start it, on CPU and loopback.

Two hosts, one of them slow, told to stop in the middle, resumed, one of them killed, resumed again although the newest
checkpoint is damaged by then; and four hosts, whose run a single one goes on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from azr_jax.checkpoint import Checkpointer
from azr_jax.config import ExecutorConfig
from azr_jax.config_loader import load_config
from azr_jax.executor import ExecutorPool
from azr_jax.train import Run, with_prompts
from tests.compiling import xla_flags
from tests.learn.test_two_processes import free_port

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    *("tasks.seed_factor=1", "executor.workers=1", "eval.every=1", "eval.per_kind=2"),
    *("learn.lr=1e-5", "checkpoint.every=1", "checkpoint.keep=9"),
]
#: What SLOW says is slept before every block of decoding; death is noticed a little sooner than for users.
PROGRAM = """
import os, sys, time
from azr_jax.cli import main
from jax._src import cache_key
from azr_jax.dist import watch
from azr_jax.rollout.engine import Engine

watch.DEAD_SECONDS = 15
cache_key._hash_accelerator_config = lambda *_: None  # differs between CPU hosts: all but one would miss
slow, step = float(os.environ["SLOW"]), Engine.step
Engine.step = lambda self: (time.sleep(slow), step(self))[1]

def spoiled(self, state, step):
    if step.number == 2:  # a broken machine: what it holds of weights that all hosts hold is another number
        state = state._replace(params=jax.tree.map(other_here, state.params))
    return learn(self, state, step)

def other_here(x):
    if not x.sharding.is_fully_replicated:
        return x
    here = [jax.device_put(1.5 * shard.data, shard.device) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, here)

if os.environ["SPOIL"] == "yes":
    import jax
    from azr_jax import train
    learn, train.Run.learn = train.Run.learn, spoiled
sys.exit(main())
"""
#: Figures of the clock and of this machine.
UNREPEATABLE = ("time/", "perf/", "executor/")


@dataclass
class Job:
    """A run in the making: the process of each host."""

    hosts: list[subprocess.Popen[str]]

    def end(self) -> list[tuple[int, str]]:
        """Exit code and log of each host."""
        return [(host.returncode, log) for host in self.hosts for _, log in [host.communicate(timeout=600)]]


@dataclass
class Place:
    """Where runs are, and what they compiled."""

    folder: Path

    def start(self, name: str, count: int, *settings: str, slow: float = 0.0, spoil: bool = False) -> Job:
        """The run of this name, on so many hosts; the last one is slow, or computes something else from step 2 on."""
        config = [str(ROOT / "configs/debug_cpu.yaml"), f"run_dir={self.folder / name}"]
        environment = os.environ | {
            "XLA_FLAGS": xla_flags(1, quick=True),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", PROGRAM, "train", *config, *SETTINGS, *settings]
        job = ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", str(count)]
        return Job(
            [
                subprocess.Popen(
                    [*command, *([*job, "--host", str(i)] if count > 1 else [])],
                    cwd=ROOT,
                    env=environment
                    | {"SLOW": str(slow if i == count - 1 else 0.0), "SPOIL": "yes" if spoil and i else "no"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for i in range(count)
            ]
        )

    def rows(self, name: str) -> list[dict]:
        """Of metrics.jsonl, whole ones."""
        path = self.folder / name / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def wait_for_step(self, job: Job, name: str, step: int) -> None:
        deadline = time.monotonic() + 600
        while not any(row["step"] >= step for row in self.rows(name)):
            ended = [host for host in job.hosts if host.poll() is not None]
            assert not ended and time.monotonic() < deadline, [host.stderr and host.stderr.read() for host in ended]
            time.sleep(0.02)

    def latest(self, name: str) -> int:
        found = Checkpointer(self.folder / name / "checkpoints", 3).latest()
        assert found is not None
        return found


@dataclass
class Runs:
    """The same run by one host, by two, with all that befell them, and by four; logs and exit codes of each host."""

    place: Place
    stopped: list[tuple[int, str]]  # host 1 was told to stop
    stopped_at: int
    killed: list[tuple[int, str]]  # host 1 was killed
    damaged: int  # step of the checkpoint that was cut in half then
    resumed: list[tuple[int, str]]
    steps: int
    four: list[tuple[int, str]]
    fewer: list[tuple[int, str]]  # one host, going on with the run of the four


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = Place(tmp_path_factory.mktemp("hosts"))
    ends, latest = [], [0]
    for number in (signal.SIGTERM, signal.SIGKILL):
        job = place.start("two", 2, "steps=400", slow=0.05)
        place.wait_for_step(job, "two", latest[-1] + 1)
        job.hosts[1].send_signal(number)
        ends.append(job.end())
        latest.append(place.latest("two"))
    _, stopped_at, damaged = latest
    state = place.folder / f"two/checkpoints/step_{damaged:06d}/state"
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    steps = damaged + 1
    resumed = place.start("two", 2, f"steps={steps}", slow=0.05).end()
    four = place.start("four", 4, "steps=1").end()
    fewer = place.start("four", 1, "steps=2").end()
    ((code, log),) = place.start("alone", 1, f"steps={steps}").end()
    assert code == 0, log
    return Runs(place, ends[0], stopped_at, ends[1], damaged, resumed, steps, four, fewer)


def assert_the_same(place: Place, name: str, steps: int) -> None:
    """As the run of one host, up to this step."""
    alone, many = place.rows("alone"), place.rows(name)
    assert len(many) == steps + 1
    for one, other in zip(alone[: steps + 1], many, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if not key.startswith(UNREPEATABLE):
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (one["step"], key)
    for step in range(1, steps + 1):
        rollouts = f"rollouts/step_{step:06d}.jsonl"
        assert (place.folder / name / rollouts).read_bytes() == (place.folder / "alone" / rollouts).read_bytes()
    tasks, expected = (
        [row for row in map(json.loads, (place.folder / each / "tasks.jsonl").open()) if row["step"] <= steps]
        for each in (name, "alone")
    )
    assert tasks == expected and tasks[-1]["step"] == steps


def assert_weights(place: Place, name: str, step: int) -> None:
    """As those of one host, to a tenth of what an update moves them by; read by one process."""
    config = load_config(place.folder / name / "config.yaml", [])
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        params = Run(*with_prompts(config), pool).fresh_state().params
    part = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)}
    one, other = (
        Checkpointer(place.folder / each / "checkpoints", 9).restore_part(step, part) for each in ("alone", name)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


def test_two_hosts_make_the_run_of_one(runs: Runs) -> None:
    """Token for token, through a stop, a kill and a damaged checkpoint, though one of them is slow."""
    assert_the_same(runs.place, "two", runs.steps)
    assert runs.place.latest("two") == runs.place.latest("alone") == runs.steps
    assert_weights(runs.place, "two", runs.steps)


def test_four_hosts_make_the_run_of_one(runs: Runs) -> None:
    """And so does one that takes it over from them."""
    assert [code for code, _ in runs.four] == [0] * 4, runs.four
    ((code, log),) = runs.fewer
    assert code == 0 and "resuming after step 1" in log, log
    assert_the_same(runs.place, "four", 2)
    for step in (1, 2):
        assert_weights(runs.place, "four", step)


def test_a_stop_of_one_host_stops_and_saves_on_all(runs: Runs) -> None:
    (first, log), (second, other) = runs.stopped
    assert first == second == 0, runs.stopped
    assert "SIGTERM" in other
    for said in (log, other):
        assert f"stopped after step {runs.stopped_at} of 400; resumable: run the same command again" in said


def test_a_host_that_is_killed_ends_the_run_on_all(runs: Runs) -> None:
    """With one line that says which and what to do."""
    (code, log), _ = runs.killed
    assert f"resuming after step {runs.stopped_at}" in log
    (line,) = [line for line in log.splitlines() if line.startswith("azr-jax:")]
    assert code == 75 and "host 1 has been silent" in line and "resumes" in line and "Traceback" not in log


def test_a_damaged_checkpoint_is_skipped_by_all_hosts(runs: Runs) -> None:
    """Also by those that need not read the part that is damaged."""
    assert [code for code, _ in runs.resumed] == [0, 0], runs.resumed
    skipped = f"skipping checkpoint {runs.place.folder}/two/checkpoints/step_{runs.damaged:06d}"
    assert all(skipped in log for _, log in runs.resumed)
    assert f"resuming after step {runs.damaged - 1}" in runs.resumed[0][1]


def test_hosts_that_come_apart_stop_before_they_save_it(runs: Runs) -> None:
    """In the last step too, and with a single checkpoint kept: it is the one from before, and it can be read."""
    place = runs.place
    ends = place.start("apart", 2, "steps=2", "checkpoint.keep=1", "eval.every=0", spoil=True).end()
    assert [code for code, _ in ends] == [1, 1], ends
    assert all("come apart (the update): learner/" in log and "Traceback" not in log for _, log in ends), ends
    assert place.latest("apart") == 1
    assert_weights(place, "apart", 1)


def test_one_host_reports_and_the_others_only_warn(runs: Runs) -> None:
    (_, log), (_, other) = runs.resumed
    assert f"step {runs.steps}/{runs.steps}" in log and "report.html" in log
    assert "solved" not in other and "report.html" not in other
