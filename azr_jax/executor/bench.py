"""What the executor does a second on this machine, against the floor: a bare fork of the same warm interpreter.

Both are taken in one run, in turns of half a second, on as many cores as the pool has workers, because a machine's
speed changes from second to second and only their ratio travels.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace

from azr_jax.config import ExecutorConfig
from azr_jax.executor.pool import ExecutorPool
from azr_jax.executor.protocol import Request, Verdict
from azr_jax.executor.worker import environment, python_command

_BATCH = 256
_TURN_SECONDS = 0.5
_PROGRAM = """def f(items):
    total = {n}
    for item in items:
        total += item * 2
    return [total, str(total)]
"""


def measure(config: ExecutorConfig, seconds: float) -> dict[str, float]:
    """Figures for `config.workers` workers; each of the four parts takes about `seconds`.

    runs_per_second: one program and input in a process of its own. floor_runs_per_second: fork, compile, exec and exit
    in the same warm interpreter, without any isolation, one such process a worker. calls_per_second: inputs of one
    program that share a child. p50_ms, p99_ms: of benign runs one at a time, `loaded_p99_ms` while the pool is full.
    """
    with ExecutorPool(config) as pool:
        pool.run_all(_distinct(0, 64))
        runs, floor = _rates(pool, config.workers, seconds)
        calls = _calls(pool, seconds)
        idle = _latencies(pool, seconds / 2, load=0)
        loaded = _latencies(pool, seconds / 2, load=4 * config.workers)
        stats = pool.stats()
    return {
        "runs_per_second": runs,
        "runs_per_second_per_core": runs / config.workers,
        "floor_runs_per_second": floor,
        "ratio_to_floor": floor / runs,
        "calls_per_second": calls,
        "calls_per_second_per_core": calls / config.workers,
        "p50_ms": idle[len(idle) // 2],
        "p99_ms": idle[len(idle) * 99 // 100],
        "loaded_p50_ms": loaded[len(loaded) // 2],
        "loaded_p99_ms": loaded[len(loaded) * 99 // 100],
        "worker_rss_mb": stats["worker_rss_mb"],
        "infra": stats.get("status_infra", 0.0),
    }


def _distinct(first: int, count: int) -> list[Request]:
    """Requests with a program each, so that nothing is cached and nothing shares a child."""
    return [
        Request(str(number), "run", program=_PROGRAM.replace("{n}", str(number)), input="[1, 2, 3]")
        for number in range(first, first + count)
    ]


def _rates(pool: ExecutorPool, workers: int, seconds: float) -> tuple[float, float]:
    """Runs a second of the pool and of the floor, each for `seconds` in all, by turns."""
    done, spent, floors = 0, 0.0, []
    while spent < seconds:
        floors.append(_floor(workers, _TURN_SECONDS))
        start = time.monotonic()
        while time.monotonic() - start < _TURN_SECONDS:
            _check(pool.run_all(_distinct(1_000_000 + done, _BATCH)))
            done += _BATCH
        spent += time.monotonic() - start
    return done / spent, len(floors) / sum(1 / floor for floor in floors)  # both: runs by time


def _calls(pool: ExecutorPool, seconds: float) -> float:
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        inputs = tuple(f"[{number}, 2]" for number in range(16))
        requests = [replace(request, input="", inputs=inputs) for request in _distinct(done, 64)]
        _check(pool.run_all(requests))
        done += 64 * 16
    return done / (time.monotonic() - start)


def _latencies(pool: ExecutorPool, seconds: float, load: int) -> list[float]:
    """Milliseconds from submit to verdict of single runs, sorted, with `load` other runs in the pool all the time."""
    times: list[float] = []
    number, start = 2_000_000 * (1 + bool(load)), time.monotonic()
    while time.monotonic() - start < seconds:
        number += 1
        asked = time.monotonic()
        (probe,) = _distinct(number, 1)
        pool.submit([probe])
        while True:
            if pool.pending <= load:
                number += load
                pool.submit(_distinct(number, load))
            verdicts = pool.poll(1.0)
            if any(verdict.id == probe.id for verdict in verdicts):
                break
        times.append(1e3 * (time.monotonic() - asked))
    while pool.pending:
        pool.poll(1.0)
    return sorted(times)


def _check(verdicts: list[Verdict]) -> None:
    bad = next((verdict for verdict in verdicts if verdict.status != "ok"), None)
    if bad is not None:
        raise RuntimeError(f"a benign program got {bad}")


def _floor(workers: int, seconds: float) -> float:
    """Runs a second of `workers` processes that fork, compile, exec and exit without any isolation."""
    command = python_command(f"from azr_jax.executor.zygote import floor; floor({seconds!r}, {_PROGRAM!r})")
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) for _ in range(workers)]
    return sum(json.loads(process.communicate()[0]) for process in processes)
