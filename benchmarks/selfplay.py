"""Does the device wait for the executor? One self-play step with slow executions, streamed and in blocking phases.

    python benchmarks/selfplay.py --out benchmarks/results/selfplay.json

The embedded model proposes, solves and is judged as in a run (no update); it computes on one core and the executor on
the others, as a device and its host would, or they would only take each other's time. Every verdict is held back until
a given time after its request, 300 ms by default, as if each program took that long on a core of its own. Compared are
the stream of `azr_jax/stream.py` and phases that wait for one another as the reference's do: all responses, then all
verdicts, then what follows from them. Times are of the same steps (same seed, weights and buffers), the median of
several, taken in turns; the trajectories of all four are compared and must be equal.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from result import about, write

import azr_jax.selfplay
from azr_jax.config import Config, ExecutorConfig, RolloutConfig, TasksConfig
from azr_jax.executor import ExecutorPool, Request, Verdict
from azr_jax.selfplay import SelfPlay
from azr_jax.stream import Stream
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.train import Run, with_prompts


class Slow:
    """A pool whose verdicts come `seconds` after their requests, or when they are known if that is later."""

    def __init__(self, pool: ExecutorPool, seconds: float) -> None:
        self.pool, self.seconds = pool, seconds
        self._due: dict[str, float] = {}
        self._held: deque[Verdict] = deque()

    def submit(self, requests: list[Request]) -> None:
        self._due |= {request.id: time.monotonic() + self.seconds for request in requests}
        self.pool.submit(requests)

    def poll(self, timeout: float = 0.0) -> list[Verdict]:
        end = time.monotonic() + timeout
        while True:
            self._held.extend(self.pool.poll(0.0))
            now = time.monotonic()
            due = [verdict for verdict in self._held if self._due[verdict.id] <= now]
            if due or now >= end:
                self._held = deque(verdict for verdict in self._held if self._due[verdict.id] > now)
                return due
            time.sleep(0.002)


class Phases(Stream):
    """The same requests, but nothing is asked before everything before it was answered."""

    def run(self) -> None:
        while self._responses or self._checks:
            requests, self._requests = self._requests, []
            self.engine.submit(requests)
            while self.engine.busy:
                self.engine.step()
            done = self.engine.poll()
            for name in sorted(done, key=repr):
                attempt, heard = self._responses.pop(name)
                attempt.completion = done[name]
                attempt.response = self.engine.text(done[name])
                heard(attempt)
            questions, self._questions = self._questions, []
            self.pool.submit(questions)
            verdicts: dict[str, Verdict] = {}
            while len(verdicts) < len(questions):
                verdicts |= {verdict.id: verdict for verdict in self.pool.poll(1.0)}
            for question in questions:
                entry = self._checks.pop(question.id, None)
                if entry is not None:
                    entry[1](entry[0], verdicts[question.id])


def one_step(run: Run, params: Any, state: dict, stream: type[Stream], pool: Any, number: int) -> dict[str, Any]:
    """A step from the same buffers; its seconds, the share the device was busy, and what came out."""
    play = SelfPlay(run.config, run.engine, pool, run.prompts, run.selfplay.held_out)
    play.buffers = TaskBuffers.from_json(state, play.rules)
    azr_jax.selfplay.Stream = stream  # type: ignore[misc]
    before, started = replace(run.engine.stats), time.monotonic()
    step = play.step(params, number)
    seconds = time.monotonic() - started
    busy = run.engine.stats.device_seconds - before.device_seconds
    trajectories = [(a.identity, a.response, a.reward) for a in step.attempts]
    return {"seconds": seconds, "device_share": busy / seconds, "trajectories": trajectories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.3, help="seconds an execution takes")
    parser.add_argument("--batch", type=int, default=64, help="proposals and solves of each kind")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = Config(
        tasks=TasksConfig(batch=args.batch, references=1, induction_inputs=6, seed_factor=2),
        rollout=RolloutConfig(max_prompt=96, max_response=64, slots=64, page=32, prefill_tokens=512),
        executor=ExecutorConfig(workers=1),
    )
    ways: dict[str, tuple[type[Stream], float]] = {
        "stream_instant": (Stream, 0.0),
        "stream_slow": (Stream, args.delay),
        "phases_instant": (Phases, 0.0),
        "phases_slow": (Phases, args.delay),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)  # what the pool starts stays there
    with ExecutorPool(config.executor) as pool:
        os.sched_setaffinity(0, cores[:1])  # JAX starts its threads later
        run = Run(*with_prompts(config), pool)
        params = run.fresh_state().params
        run.warm_up(params)
        run.selfplay.seed(params)
        state = run.selfplay.buffers.to_json()
        for number in range(args.steps + 1):  # the first one warms up
            for name, (stream, delay) in ways.items():
                found[name].append(
                    one_step(run, params, state, stream, Slow(pool, delay) if delay else pool, number + 1)
                )
    for results in zip(*found.values(), strict=True):
        if any(result["trajectories"] != results[0]["trajectories"] for result in results):
            raise SystemExit("the four ways produced different trajectories")
    record = about(jax.devices()[0].device_kind) | {
        "delay_seconds": args.delay,
        "batch": args.batch,
        "responses_a_step": len(found["stream_slow"][-1]["trajectories"]),
    }
    for name, results in found.items():
        record[name] = {
            "seconds": statistics.median(result["seconds"] for result in results[1:]),
            "device_share": statistics.median(result["device_share"] for result in results[1:]),
        }
    record["stream_ratio"] = record["stream_slow"]["seconds"] / record["stream_instant"]["seconds"]
    record["phases_ratio"] = record["phases_slow"]["seconds"] / record["phases_instant"]["seconds"]
    record["phases_slow_over_stream_slow"] = record["phases_slow"]["seconds"] / record["stream_slow"]["seconds"]
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if args.out:
        write(args.out, record)


if __name__ == "__main__":
    main()
