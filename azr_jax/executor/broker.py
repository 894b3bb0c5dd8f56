"""The broker: a process beside the trainer that takes requests, drives the crew of workers and answers with verdicts.

It exists so that nothing a model wrote is parsed, compared or waited for in the trainer, and so that no program can be
an heir of the process that holds the accelerator. Requests and verdicts are JSON lines over one socket; when that
closes, or the parent changes, everything goes. The command line is the configuration as JSON.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from azr_jax.executor.crew import Crew, CrewFailure
from azr_jax.executor.flows import Ask, Flow, Outcomes, flow_of
from azr_jax.executor.lockdown import MANDATORY
from azr_jax.executor.protocol import Request, Verdict, request_from_wire, verdict_to_wire
from azr_jax.executor.runs import Limits, Outcome, Run
from azr_jax.tasks.validation import static_rejection

_MAX_OPEN = 2048  # requests in work; beyond that we stop reading, and the trainer's writes wait
_MESSAGES_A_TURN = 8  # of the trainer; between turns, workers that have become free get their next run
_COLLECT_SECONDS = 0.01  # that verdicts wait for company while runs are queued: each message wakes the trainer
_CACHE_VERDICTS = 8192
_CACHE_CHARS = 4096  # of a request; a bound on the cache's memory
_NOT_CACHED = ("infra", "memory", "crashed")  # another time may tell more
_LATENCIES = 4096
_READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped each time


def main() -> None:
    """Entry point of the broker process."""
    warnings.simplefilter("ignore")  # about invalid escapes in model text
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Broker(json.loads(sys.argv[1]), socket.socket(fileno=0)).serve()
    except MemoryError:  # the trainer starts another and says so; a traceback would tell nobody more
        sys.exit("azr-jax: the executor's broker ran out of memory")


class Broker:
    """Requests in, verdicts out, flows and their runs in between."""

    def __init__(self, config: dict[str, Any], control: socket.socket) -> None:
        self._config = config
        self._control = control
        control.setblocking(False)
        self._parent = os.getppid()
        self._selector = selectors.DefaultSelector()
        limits = Limits(**{name: config[name] for name in Limits.__dataclass_fields__})
        self._crew = Crew(config["workers"], limits, self._selector, config["max_children"])
        self._jobs: dict[Request, Job] = {}  # in work; requests carry no id here, so equal ones are one job
        self._numbers: dict[int, Job] = {}  # the trainer's numbers of open requests
        self._cache: OrderedDict[Request, Verdict] = OrderedDict()  # least recently used first
        self._inbox = self._outbox = b""
        self._lines: deque[bytes] = deque()  # messages of the trainer not looked at yet
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._events = selectors.EVENT_READ  # what we wait for on the trainer's socket
        self._flushed = 0.0  # when we last sent
        self._blocked = False  # whether the trainer's socket took no more then
        self._greeted = False
        self._open = True

    def serve(self) -> None:
        """Work until the trainer closes the socket or dies."""
        self._selector.register(self._control, self._events, self._receive)
        try:
            while self._open and os.getppid() == self._parent:
                for key, events in self._selector.select(self._timeout()):
                    if key.data == self._receive:
                        if events & selectors.EVENT_WRITE:
                            self._flush()
                        if events & selectors.EVENT_READ:
                            self._receive()
                    else:
                        key.data()
                for _ in range(min(_MESSAGES_A_TURN, len(self._lines))):
                    self._obey(json.loads(self._lines.popleft().decode()))
                self._crew.tick()
                self._greet()
                if self._outbox and (not self._crew.busy or time.monotonic() - self._flushed > _COLLECT_SECONDS):
                    self._flush()
                self._listen_or_not()
        except CrewFailure as failure:
            self._send({"failed": str(failure)})
        finally:
            self._flush()
            self._crew.close()

    def _timeout(self) -> float:
        if self._lines:
            return 0.0
        return min(0.5, self._crew.timeout(), _COLLECT_SECONDS if self._outbox and not self._blocked else 1.0)

    def _greet(self) -> None:
        """Say once which layers hold, or refuse to work."""
        if self._greeted:
            return
        worker = next((worker for worker in self._crew.workers if worker.ready), None)
        if worker is None:
            return
        self._greeted = True
        missing = [layer for layer in MANDATORY if not worker.layers.get(layer)]
        if missing and not self._config["allow_weaker_sandbox"]:
            detail = f" ({worker.fault})" if worker.fault else ""
            failure = f"sandbox layers missing on this machine: {', '.join(missing)}{detail}"
            self._send({"failed": failure, "weak": True})
            self._open = False
        else:
            self._send({"layers": worker.layers})

    # The trainer's socket

    def _receive(self) -> None:
        try:
            data = self._control.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._open = False
            return
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        self._lines += lines

    def _obey(self, message: dict[str, Any]) -> None:
        if "request" in message:
            self._take(message["number"], request_from_wire({"id": "", **message["request"]}))
        elif "drop" in message:
            for number in message["drop"]:
                self._drop(number)
        else:
            self._send({"stats": self._stats()})

    def _take(self, number: int, request: Request) -> None:
        """Start on a request, unless an equal one was answered before or is in work."""
        self._counts["requests"] += 1
        if request in self._cache:
            self._counts["duplicates"] += 1
            self._cache.move_to_end(request)
            self._answer(number, self._cache[request])
            return
        job = self._jobs.get(request)
        if job is not None:
            self._counts["duplicates"] += 1
            job.numbers.append(number)
            self._numbers[number] = job
            return
        job = self._jobs[request] = self._numbers[number] = Job(self, number, request)
        job.advance(None)

    def _send(self, message: dict[str, Any]) -> None:
        self._outbox += json.dumps(message).encode() + b"\n"  # goes out at the end of this turn of the loop

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        try:
            while self._outbox:
                self._outbox = self._outbox[self._control.send(self._outbox) :]
            self._blocked = False
        except BlockingIOError:
            self._blocked = True
        except OSError:
            self._open = False

    def _listen_or_not(self) -> None:
        """Back-pressure: read new requests only while there are few enough open ones."""
        events = selectors.EVENT_READ if len(self._jobs) < _MAX_OPEN and not self._lines else 0
        events |= selectors.EVENT_WRITE if self._blocked else 0
        if events != self._events:
            if self._events:
                self._selector.unregister(self._control)
            if events:
                self._selector.register(self._control, events, self._receive)
            self._events = events

    # Jobs

    def flow(self, request: Request) -> Flow:
        """The steps of a request under this broker's configuration."""
        return flow_of(request, self._config["determinism_runs"], self._config["numeric"], static_rejection)

    def finish(self, job: Job, verdict: Verdict) -> None:
        """Answer the trainer, once for every equal request that waited."""
        del self._jobs[job.request]
        if verdict.status not in _NOT_CACHED and verdict.reason != "wall" and _size(job.request) <= _CACHE_CHARS:
            self._cache[job.request] = verdict
            if len(self._cache) > _CACHE_VERDICTS:
                self._cache.popitem(last=False)
        self._latencies.append(time.monotonic() - job.started)
        for number in job.numbers:
            self._answer(number, verdict)

    def _answer(self, number: int, verdict: Verdict) -> None:
        self._numbers.pop(number, None)
        self._counts[f"status_{verdict.status}"] += 1
        if verdict.reason:
            self._counts[f"reason_{verdict.reason.split(':')[0]}"] += 1
        self._send({"number": number, "verdict": verdict_to_wire(verdict)})

    def _drop(self, number: int) -> None:
        """Nobody waits for this request any more; its job ends if nobody waits for an equal one."""
        job = self._numbers.pop(number, None)
        if job is not None:
            job.numbers.remove(number)
            if not job.numbers:
                job.cancelled = True
                del self._jobs[job.request]

    def run(self, runs: list[Run]) -> None:
        """Have runs done by the crew."""
        self._crew.submit(runs)

    def _stats(self) -> dict[str, float]:
        latencies = sorted(self._latencies)
        workers = [worker.rss_mb() for worker in self._crew.workers]
        stats: dict[str, float] = {**self._counts, **self._crew.counts}
        stats |= {
            "workers": len(workers),
            "queued": self._crew.queued,
            "in_flight": self._crew.in_flight,
            "worker_rss_mb": max(workers, default=0.0),
            "p50_ms": 1e3 * latencies[len(latencies) // 2] if latencies else 0.0,
            "p99_ms": 1e3 * latencies[len(latencies) * 99 // 100] if latencies else 0.0,
        }
        return stats


def _size(request: Request) -> int:
    """Characters of a request."""
    texts = (request.program, request.input, request.output, request.answer, *request.inputs)
    return sum(map(len, texts)) + sum(len(given) + len(expected) for given, expected in request.pairs)


class Job:
    """A request in work: its flow, and the outcomes the flow is waiting for."""

    def __init__(self, broker: Broker, number: int, request: Request) -> None:
        self.numbers = [number]
        self.request = request
        self.started = time.monotonic()
        self.cancelled = False
        self._broker = broker
        self._flow = broker.flow(request)
        self._round = 0  # of asks; tells outcomes of an abandoned round from those of the current one
        self._open = 0
        self._outcomes: list[Outcomes] = []

    def advance(self, outcomes: list[Outcomes] | None) -> None:
        """Go on with the flow until it asks for runs or returns its verdict."""
        try:
            asks = self._flow.send(outcomes) if outcomes is not None else next(self._flow)
        except StopIteration as end:
            self._broker.finish(self, end.value)
            return
        except Exception as error:  # a bug of ours must cost one sample, not the pool
            self._broker.finish(self, Verdict("", "infra", reason=f"internal:{type(error).__name__}"))
            return
        self._round += 1
        self._open = sum(len(ask.inputs) for ask in asks)
        self._outcomes = [[None] * len(ask.inputs) for ask in asks]
        this_round = self._round
        for index, ask in enumerate(asks):
            self._ask(this_round, index, ask)

    def _ask(self, this_round: int, ask_index: int, ask: Ask) -> None:
        runs = []
        for index, arguments in enumerate(ask.inputs):
            used = None if ask.used is None else ask.used[index]
            runs.append(
                Run(
                    ask.program,
                    arguments,
                    partial(self._take, this_round, ask_index, index, ask.stop),
                    group=ask.program if used is None else (id(used), this_round, ask_index),
                    used=used,
                    urgent=self.request.op == "validate",
                    wanted=lambda: self._round == this_round and not self.cancelled,
                )
            )
        self._broker.run(runs)

    def _take(
        self, this_round: int, ask: int, index: int, stop: Callable[[int, Outcome], bool], outcome: Outcome
    ) -> None:
        if self._round != this_round or self.cancelled:
            return
        self._outcomes[ask][index] = outcome
        self._open -= 1
        if self._open == 0 or stop(index, outcome):
            self._round += 1  # what is still on its way is no longer wanted
            self.advance(self._outcomes)
