"""Interrupts a tiny run again and again, lets it end, and compares it with a run that nobody disturbed.

    python benchmarks/kills.py --kills 20 --terms 20 --seed 1 [--out benchmarks/results/kills.json]

One run folder, started over and over. Each time a phase of the run is drawn (start-up, decoding, executing, update,
writing rows, saving, evaluation; first of all seeding, last of all the table at the end), then a random moment
after the run has entered it. SIGKILL ends the process there; after SIGTERM it has to end by itself with exit code 0 and
say that it is resumable. A run that lags behind may do a step first. At the end everything that must not depend on the
interruptions is compared: metrics.jsonl but for what was measured, tasks, rollouts, oversight log, outcome, weights,
optimizer, buffers. Processes of the executor that outlive their trainer are counted. Exit code 3 if anything differs.

The runs are forked from a process that has imported everything, so that a start costs a second and not four. In the
child, and only there, functions of the loop are wrapped to note in shared memory which phase runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import mmap
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""  # one device: compiles fastest
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that forks must have one thread

import jax
import numpy as np
import orbax.checkpoint as ocp

from azr_jax import cli, train
from azr_jax.checkpoint import Checkpointer
from azr_jax.executor import ExecutorPool
from azr_jax.rollout.engine import Engine
from azr_jax.selfplay import SelfPlay
from azr_jax.signals import GracefulStop
from azr_jax.telemetry.metrics import repeatable
from azr_jax.telemetry.run_folder import read_rows

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["tasks.seed_factor=1", "tasks.batch=2", "rollout.slots=16", "executor.workers=1", "checkpoint.every=1"]
SMALL += ["eval.every=3", "eval.per_kind=4", "tasks.samples=2"]
PHASES = ("boot", "start", "seed", "restore", "decode", "execute", "update", "write", "save", "evaluate", "finish")
WHOLE = ("seed", "evaluate", "finish")  # they decode and execute too
#: Phase -> the longest wait, in seconds, between entering it and the kill; some moments fall into the phase after it.
TARGETS = {"start": 1.2, "decode": 0.2, "execute": 0.01, "update": 0.1, "write": 0.02, "save": 0.12, "evaluate": 0.3}
PATIENCE = 300.0  # seconds; a run that does not get anywhere in this time hangs
PHASE, STEP = 0, 1  # bytes of the shared memory
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of a killed run become children of this process


class Watched:
    """The phase that a forked run is in, noted by the run itself in memory that outlives it."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.left: list[float] = []  # seconds from each signal to the end of the process

    @property
    def phase(self) -> str:
        """What the run does, or did when it died."""
        return PHASES[self.shared[PHASE]]

    @property
    def steps(self) -> int:
        """Steps begun by this process."""
        return self.shared[STEP]

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """In the run: note the phase, and the one before again afterwards."""
        before = self.shared[PHASE]
        if PHASES[before] not in WHOLE:
            self.shared[PHASE] = PHASES.index(phase)
        try:
            yield
        finally:
            self.shared[PHASE] = before

    def wrap(self, owner: Any, name: str, phase: str, when: Callable[..., bool] = lambda *_: True) -> None:
        """In the run: `owner.name` is that phase from now on, if `when` of its arguments."""
        function = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            if not when(*arguments):
                return function(*arguments, **named)
            with self.during(phase):
                return function(*arguments, **named)

        setattr(owner, name, noted)

    def instrument(self) -> None:
        """In the run, before it begins."""
        self.wrap(Engine, "step", "decode")
        self.wrap(ExecutorPool, "poll", "execute", lambda pool, *_: pool.pending > 0)
        self.wrap(SelfPlay, "seed", "seed")
        self.wrap(train.Run, "learn", "update")
        self.wrap(train, "write_rows", "write")
        self.wrap(train, "_timed_evaluation", "evaluate")
        self.wrap(train, "_finish", "finish")
        self.wrap(Checkpointer, "restore", "restore")
        self.wrap(Checkpointer, "save", "save")
        step, enter = SelfPlay.step, GracefulStop.__enter__

        def counted(*arguments: Any, **named: Any) -> Any:
            self.shared[STEP] += 1
            return step(*arguments, **named)

        def entered(stop: GracefulStop) -> GracefulStop:
            enter(stop)
            self.shared[PHASE] = PHASES.index("start")
            return stop

        SelfPlay.step = counted  # type: ignore[method-assign]
        GracefulStop.__enter__ = entered  # type: ignore[method-assign]


def fork_run(folder: Path, log: Path, watched: Watched, *overrides: str) -> int:
    """Starts `azr-jax train` on the folder; returns its process id."""
    sys.stdout.flush()
    watched.shared[:2] = bytes(2)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        logging.root.handlers.clear()  # what libraries did to it when they were imported
        watched.instrument()
        os.chdir(ROOT)
        code = cli.main(["train", "configs/debug_cpu.yaml", f"run_dir={folder}", *SMALL, *overrides])
    finally:
        os._exit(code)


def children() -> set[int]:
    """Processes whose parent is this one."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return found


def outlived(seconds: float = 30.0) -> int:
    """Processes that a killed run left behind and that are still there after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not children():
            return 0
        time.sleep(0.01)
    left = children()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def interrupt(pid: int, watched: Watched, number: signal.Signals, target: str, later: int, delay: float) -> str | None:
    """Sends a signal `delay` seconds after the run entered `target`, in step `later` of its own or after.

    Returns the phase it was in then; None if it came to its end before. RuntimeError: it failed, or hangs.
    """
    deadline = time.monotonic() + PATIENCE
    begins = target in ("start", "seed", "restore")
    while not (watched.phase == target and (begins or watched.steps > later)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the run ended by itself with status {status}")
            return None
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run did not reach the phase {target}")
        time.sleep(0.0002)
    time.sleep(delay)
    phase = watched.phase
    os.kill(pid, number)
    sent = time.monotonic()
    status = os.waitpid(pid, 0)[1]
    watched.left.append(time.monotonic() - sent)
    if number == signal.SIGTERM and status:
        raise RuntimeError(f"SIGTERM during {phase} ended with status {status}")
    return phase if number == signal.SIGTERM else watched.phase


def chain(folder: Path, log: Path, number: signal.Signals, times: int, steps: int, seed: int) -> dict[str, Any]:
    """Interrupts a run so many times, fewer if it comes to its end before, then lets it end."""
    rng, watched = Random(seed), Watched()
    order: list[str] = []
    met: Counter[str] = Counter()
    left, torn, reached = 0, 0, []
    for count in range(times):
        order = order or rng.sample(list(TARGETS), len(TARGETS))
        target = order.pop()
        rows = list(read_rows(folder / "metrics.jsonl"))
        step = rows[-1]["step"] if rows else -1
        reached.append(step)
        plan = count * steps // times
        if count in (0, times - 1):
            target = "finish" if count else "seed"
        elif step >= steps - 1:
            target = "start"  # or it would be over too early
        elif step > plan:
            target = "decode"
        before = log.stat().st_size if log.exists() else 0
        delay = 0.0 if step >= steps - 1 else rng.uniform(0, TARGETS.get(target, 0.3))
        pid = fork_run(folder, log, watched, f"steps={steps}")
        phase = interrupt(pid, watched, number, target, int(step < plan), delay)
        if phase is None:
            break
        if number == signal.SIGTERM and "resumable" not in log.read_text()[before:] and phase != "finish":
            raise RuntimeError(f"SIGTERM during {phase}: the log does not say that the run is resumable")
        met[phase] += 1
        torn += any("tmp" in path.name for path in (folder / "checkpoints").glob("step_*"))
        left += outlived()
    finish(folder, log, steps)
    found = {"times": sum(met.values()), "during": dict(met), "half_written_checkpoints": torn, "processes_left": left}
    seconds = {"median": round(statistics.median(watched.left), 2), "longest": round(max(watched.left), 2)}
    return found | {"seconds_to_the_end": seconds, "steps_reached": reached, "seed": seed}


def finish(folder: Path, log: Path, steps: int) -> None:
    """Runs to the end."""
    pid = fork_run(folder, log, Watched(), f"steps={steps}")
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the run ended with status {status}:\n{log.read_text()[-2000:]}")
    outlived()


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What two finished runs do not have in common and should."""
    found = []
    rows = [[repeatable(row) for row in read_rows(folder / "metrics.jsonl")] for folder in (one, other)]
    if rows[0] != rows[1] or [row["step"] for row in rows[0]] != list(range(steps + 1)):
        found.append("metrics.jsonl")
    names = ["tasks.jsonl", "oversight.jsonl", "outcome.json", "config.yaml"]
    names += sorted({path.name for folder in (one, other) for path in (folder / "rollouts").iterdir()})
    for name in names:
        paths = [folder / ("rollouts" if name.startswith("step_") else "") / name for folder in (one, other)]
        texts = [path.read_bytes().replace(str(path.parent).encode(), b"") if path.exists() else None for path in paths]
        if texts[0] != texts[1]:
            found.append(name)
    saved = [Checkpointer(folder / "checkpoints", 1) for folder in (one, other)]
    if {keeper.latest() for keeper in saved} != {steps}:
        return [*found, "the last checkpoint's step"]
    one_record, other_record = ((keeper.path(steps) / "extra/metadata").read_bytes() for keeper in saved)
    if one_record != other_record:
        found.append("buffers and counters")
    trees = [arrays(keeper.path(steps)) for keeper in saved]
    names = sorted(trees[0].keys() | trees[1].keys())
    return found + [name for name in names if trees[0].get(name) != trees[1].get(name)]


def arrays(checkpoint: Path) -> dict[str, bytes]:
    """Every array of a checkpoint by its name."""
    state = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(checkpoint / "state")
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def use_cache(folder: Path) -> None:
    """Compile every program once: what is tested here is what comes after."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs (default: 20)")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERMs, to another run (default: 0)")
    parser.add_argument("--steps", type=int, help="of a run (default: half as many as interruptions, at least 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    steps = args.steps or max(4, max(args.kills, args.terms) // 2)
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    with contextlib.ExitStack() as stack:
        place = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        use_cache(place / "compiled")
        began = time.monotonic()
        packages = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
        result: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cores": len(os.sched_getaffinity(0)), "versions": {name: version(name) for name in packages}},
            "steps": steps,
            "differences": {},
        }
        finish(place / "whole", place / "whole.log", steps)
        asked = {signal.SIGKILL: args.kills, signal.SIGTERM: args.terms}
        for number, times in asked.items():
            name = number.name
            if times:
                result[name] = chain(place / name, place / f"{name}.log", number, times, steps, args.seed)
        for name in (number.name for number, times in asked.items() if times):  # after the last fork: this needs JAX
            result["differences"][name] = differences(place / "whole", place / name, steps)
        result["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    left = any(result[name]["processes_left"] for name in result["differences"])
    return 3 if left or any(result["differences"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
