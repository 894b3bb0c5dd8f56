"""The trainer's end of the executor: start the brokers, hand over requests, collect verdicts.

Nothing here parses or compares what a model wrote. A broker serves up to `sizing.WORKERS_PER_BROKER` workers. Requests
about one program always meet the same broker, so that equal ones are answered once and inputs of one program share
processes. A broker that dies is replaced, and only its own requests are repeated (`link.py`). One thread at a time.
"""

from __future__ import annotations

import logging
import selectors
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor.link import BrokerLink
from azr_jax.executor.protocol import Request, Verdict, verdict_from_wire
from azr_jax.executor.sizing import broker_shares, default_workers, max_children

_LOG = logging.getLogger(__name__)
_START_SECONDS = 60.0
_STATS_SECONDS = 2.0
_OUTBOX_BYTES = 4 << 20  # `submit` waits, reading verdicts, while a broker has more than this unsent
_WORST_STATS = ("worker_rss_mb", "p50_ms", "p99_ms")  # of all brokers; other figures add up


class ExecutorPool:
    """Runs, validates and judges model-written programs in sandboxed processes. A context manager.

    Raises UserError if this machine lacks a mandatory sandbox layer (unless `allow_weaker_sandbox`) or workers do not
    start. Verdicts are about the programs; no exception comes of what a model wrote.
    """

    def __init__(self, config: ExecutorConfig) -> None:
        self.workers = config.workers or default_workers()
        self._number = 0
        self._finished: deque[tuple[int, Verdict]] = deque()
        self._closed = False
        self._links: list[BrokerLink] = []
        self._selector = selectors.DefaultSelector()
        children = max_children(self.workers, config.memory_mb)
        try:
            for share in broker_shares(self.workers):
                own = {"workers": share, "max_children": max(2 * share, children * share // self.workers)}
                self._links.append(BrokerLink(asdict(config) | own))
                self._watch(self._links[-1])
            self._await_start()
        except UserError:
            self._abandon()
            raise
        missing = ", ".join(sorted(layer for layer, holds in self.layers.items() if not holds))
        if missing:
            _LOG.warning("executor: this machine lacks sandbox layers: %s (docs/executor.md)", missing)

    def run_all(self, requests: Sequence[Request], deadline: float | None = None) -> list[Verdict]:
        """Verdicts of `requests`, in their order; waits for all of them.

        After `deadline` seconds the open ones are given up and come back as `infra` (reason "deadline"). Verdicts of
        requests submitted before stay for `poll`.
        """
        end = None if deadline is None else time.monotonic() + deadline
        numbers = self._submit(requests)
        mine: dict[int, Verdict] = {}
        wanted = set(numbers)
        others: deque[tuple[int, Verdict]] = deque()
        while True:
            while self._finished:
                number, verdict = self._finished.popleft()
                if number in wanted:
                    mine[number] = verdict
                else:
                    others.append((number, verdict))
            if len(mine) == len(wanted):
                break
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                self._give_up({number for number in numbers if number not in mine})
                continue
            self._pump(left)
        self._finished = others
        return [mine[number] for number in numbers]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests` and return; their verdicts come from `poll`, in any order, matched by id."""
        self._submit(requests)

    def poll(self, timeout: float = 0.0) -> list[Verdict]:
        """Verdicts that are ready; waits up to `timeout` seconds for the first one if there are open requests."""
        end = time.monotonic() + timeout
        self._pump(0.0)
        while not self._finished and self.pending and (left := end - time.monotonic()) > 0:
            self._pump(left)
        verdicts = [verdict for _, verdict in self._finished]
        self._finished.clear()
        return verdicts

    def give_up(self) -> None:
        """Answer every open request with `infra` (reason "deadline"): a step's time is over. `poll` hands them out."""
        self._give_up({number for link in self._links for number in link.open})

    @property
    def pending(self) -> int:
        """Requests whose verdict has not been handed out yet."""
        return sum(len(link.open) for link in self._links) + len(self._finished)

    @property
    def layers(self) -> dict[str, bool]:
        """Sandbox layer -> whether it holds on this machine."""
        names = {name for link in self._links for name in link.layers}
        return {name: all(link.layers.get(name, False) for link in self._links) for name in sorted(names)}

    @property
    def broker_pids(self) -> list[int]:
        """Process ids of the brokers, whose children are the workers; a dead broker is replaced by another."""
        return [link.process.pid for link in self._links]

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` has something to do, be it to read or to write."""
        return self._selector.fileno()  # type: ignore[attr-defined, no-any-return]

    def stats(self) -> dict[str, float]:
        """Counts since the start and the latest latencies; docs/executor.md lists the names."""
        for link in self._links:
            link.stats = None
            link.send({"stats": True})
            self._watch(link)
        end = time.monotonic() + _STATS_SECONDS
        while any(link.stats is None for link in self._links) and time.monotonic() < end:
            self._pump(end - time.monotonic())
        stats: dict[str, float] = {}
        for link in self._links:
            for name, value in (link.stats or {}).items():
                stats[name] = max(stats.get(name, 0.0), value) if name in _WORST_STATS else stats.get(name, 0.0) + value
        return {**stats, "broker_restarts": float(sum(link.restarts for link in self._links))}

    def close(self) -> None:
        """Stop every process of the pool. Open requests get no verdict."""
        if self._closed:
            return
        self._closed = True
        self._selector.close()
        for link in self._links:
            link.close()
        for link in self._links:
            link.wait()

    def __enter__(self) -> ExecutorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _await_start(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while waiting := [link for link in self._links if not link.layers]:
            if time.monotonic() > end or any(link.process.poll() is not None for link in waiting):
                self._pump(0.0)  # its last words say more
                raise UserError("executor: the broker process does not start; `azr-jax doctor` shows what is missing")
            self._pump(0.5)

    def _abandon(self) -> None:
        if not self._closed:
            self._closed = True
            self._selector.close()
            for link in self._links:
                link.kill()

    def _submit(self, requests: Sequence[Request]) -> list[int]:
        numbers = []
        for request in requests:
            self._number += 1
            numbers.append(self._number)
            link = self._home(request)
            link.ask(self._number, request)
            if len(link.outbox) > _OUTBOX_BYTES:
                self._watch(link)
                while len(link.outbox) > _OUTBOX_BYTES // 2:
                    self._pump(None)
        for link in self._links:
            self._watch(link)
        self._pump(0.0)
        return numbers

    def _home(self, request: Request) -> BrokerLink:
        """The broker for everything about one program."""
        if len(self._links) == 1:
            return self._links[0]
        text = request.answer if request.kind == "induction" else request.program or request.answer
        return self._links[zlib.crc32(text.encode("utf-8", "surrogatepass")) % len(self._links)]

    def _give_up(self, numbers: set[int]) -> None:
        for link in self._links:
            dropped = sorted(numbers & link.open.keys())
            if dropped:
                link.send({"drop": dropped})
                self._watch(link)
            for number in dropped:
                self._settle(link, number, Verdict("", "infra", reason="deadline"))

    def _settle(self, link: BrokerLink, number: int, verdict: Verdict) -> None:
        request = link.answered(number)
        if request is not None:
            self._finished.append((number, replace(verdict, id=request.id)))

    # Moving bytes

    def _watch(self, link: BrokerLink) -> None:
        """Wait for the link to be readable, and writable as long as there is something to send."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.outbox else 0)
        try:
            if self._selector.get_key(link.control).events != events:
                self._selector.modify(link.control, events, link)
        except KeyError:
            self._selector.register(link.control, events, link)

    def _pump(self, timeout: float | None) -> None:
        """Move bytes both ways until something came in, some of a long queue went out, or time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = self._selector.select(left)
            came = False
            for key, events in ready:
                link: BrokerLink = key.data
                long = len(link.outbox) > _OUTBOX_BYTES // 2
                alive = link.write() if events & selectors.EVENT_WRITE else True
                messages = link.read() if alive and events & selectors.EVENT_READ else []
                if not alive or messages is None:
                    self._revive(link)
                    came = True
                    continue
                for message in messages:
                    self._obey(link, message)
                came = came or bool(events & selectors.EVENT_READ) or long
                self._watch(link)
            if came or not ready or (end is not None and time.monotonic() >= end):
                return

    def _obey(self, link: BrokerLink, message: dict[str, Any]) -> None:
        if "verdict" in message:
            link.deaths_in_a_row = 0
            self._settle(link, message["number"], verdict_from_wire({"id": "", **message["verdict"]}))
        elif "stats" in message:
            link.stats = {name: float(value) for name, value in message["stats"].items()}
        elif "layers" in message:
            link.layers = message["layers"]
        else:
            self._abandon()
            advice = "; executor.allow_weaker_sandbox=true runs without (docs/executor.md)" if "weak" in message else ""
            raise UserError(f"executor: {message['failed']}{advice}")

    def _revive(self, link: BrokerLink) -> None:
        """The broker is gone: start another and repeat what was open, once."""
        self._selector.unregister(link.control)
        time.sleep(0.1 * 2**link.deaths_in_a_row)
        try:
            for number, verdict in link.restart():
                self._settle(link, number, verdict)
        except UserError:
            self._abandon()
            raise
        self._watch(link)
