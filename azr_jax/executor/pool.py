"""The trainer's end of the executor: start the broker, hand over requests, collect verdicts.

Nothing here parses or compares what a model wrote. The broker is started by exec, so it inherits neither the memory nor
the devices of this process, and it goes when this process goes, however that happens. If the broker itself dies it is
started again and its open requests are repeated once; after that they are answered `infra`. One thread at a time.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor.protocol import Request, Verdict, request_to_wire, verdict_from_wire
from azr_jax.executor.sizing import default_workers, max_children
from azr_jax.executor.worker import start_python

_LOG = logging.getLogger(__name__)
_START_SECONDS = 60.0
_CLOSE_SECONDS = 2.0
_MAX_RESTARTS = 3  # of the broker without a verdict in between
_OUTBOX_BYTES = 4 << 20  # `submit` waits, reading verdicts, while more than this is unsent


class ExecutorPool:
    """Runs, validates and judges model-written programs in sandboxed processes. A context manager.

    Raises UserError if this machine lacks a mandatory sandbox layer (unless `allow_weaker_sandbox`) or workers do not
    start. Verdicts are about the programs; no exception comes of what a model wrote.
    """

    def __init__(self, config: ExecutorConfig) -> None:
        workers = config.workers or default_workers()
        self.workers = workers
        self.layers: dict[str, bool] = {}
        self._settings = asdict(config) | {"workers": workers, "max_children": max_children(workers, config.memory_mb)}
        self._open: dict[int, Request] = {}  # sent or about to be, by number
        self._repeated: set[int] = set()
        self._number = 0
        self._finished: deque[tuple[int, Verdict]] = deque()
        self._stats: dict[str, float] | None = None
        self._restarts = 0
        self._closed = False
        self._start()

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
                self._give_up([number for number in numbers if number not in mine])
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
        while not self._finished and self._open and (left := end - time.monotonic()) > 0:
            self._pump(left)
        verdicts = [verdict for _, verdict in self._finished]
        self._finished.clear()
        return verdicts

    def give_up(self) -> None:
        """Answer every open request with `infra` (reason "deadline"): a step's time is over. `poll` hands them out."""
        self._give_up(list(self._open))

    @property
    def pending(self) -> int:
        """Requests whose verdict has not been handed out yet."""
        return len(self._open) + len(self._finished)

    @property
    def broker_pid(self) -> int:
        """Process id of the broker, whose children are the workers; it changes when a dead broker is replaced."""
        return self._process.pid

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` has something to do."""
        return self._control.fileno()

    @property
    def unsent(self) -> bool:
        """Whether `poll` also has something to do once `fileno` can be written to."""
        return bool(self._outbox)

    def stats(self) -> dict[str, float]:
        """Counts since the start and the latest latencies; docs/executor.md lists the names."""
        self._stats = None
        self._queue({"stats": True})
        end = time.monotonic() + _CLOSE_SECONDS
        while self._stats is None and time.monotonic() < end:
            self._pump(end - time.monotonic())
        return {**(self._stats or {}), "broker_restarts": float(self._restarts)}

    def close(self) -> None:
        """Stop every process of the pool. Open requests get no verdict."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers see their control sockets close
            self._process.wait()

    def __enter__(self) -> ExecutorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        try:
            self._process = start_python("broker", [json.dumps(self._settings)], theirs, quiet=False)
        except OSError as error:
            raise UserError(f"executor: cannot start a process ({error.strerror}); free memory or processes") from None
        finally:
            theirs.close()
        self._control.setblocking(False)
        self._inbox = b""
        self._outbox = bytearray()
        self.layers = {}
        end = time.monotonic() + _START_SECONDS
        while not self.layers:
            if time.monotonic() > end or self._process.poll() is not None:
                self._abandon()
                raise UserError("executor: the broker process does not start; `azr-jax doctor` shows what is missing")
            self._pump(0.5)

    def _abandon(self) -> None:
        self._closed = True
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _submit(self, requests: Sequence[Request]) -> list[int]:
        numbers = []
        for request in requests:
            self._number += 1
            self._open[self._number] = request
            numbers.append(self._number)
            self._queue({"number": self._number, "request": request_to_wire(replace(request, id=""))})
            if len(self._outbox) > _OUTBOX_BYTES:
                self._pump(None, until_sent=_OUTBOX_BYTES // 2)
        self._pump(0.0)
        return numbers

    def _give_up(self, numbers: Sequence[int]) -> None:
        self._queue({"drop": list(numbers)})
        for number in numbers:
            self._settle(number, Verdict("", "infra", reason="deadline"))

    def _queue(self, message: dict[str, Any]) -> None:
        self._outbox += json.dumps(message).encode() + b"\n"

    def _settle(self, number: int, verdict: Verdict) -> None:
        request = self._open.pop(number, None)
        if request is not None:
            self._repeated.discard(number)
            self._finished.append((number, replace(verdict, id=request.id)))

    def _pump(self, timeout: float | None, until_sent: int | None = None) -> None:
        """Move bytes both ways until something came in, everything is sent (or `until_sent` is left), or time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            writing = [self._control] if self._outbox else []
            readable, writable, _ = select.select([self._control], writing, [], left)
            alive = self._write() if writable else True
            if not alive or (readable and not self._read()):
                self._revive()
                return
            if until_sent is not None and len(self._outbox) > until_sent:
                continue
            if readable or not writable or (end is not None and time.monotonic() >= end):
                return

    def _write(self) -> bool:
        try:
            sent = self._control.send(memoryview(self._outbox)[: 1 << 20])
        except BlockingIOError:
            return True
        except OSError:
            return False
        del self._outbox[:sent]
        return True

    def _read(self) -> bool:
        try:
            data = self._control.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(data)

    def _obey(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._restarts = 0
            self._settle(message["number"], verdict_from_wire({"id": "", **message["verdict"]}))
        elif "stats" in message:
            self._stats = {name: float(value) for name, value in message["stats"].items()}
        elif "layers" in message:
            self.layers = message["layers"]
        else:
            self._abandon()
            advice = "; executor.allow_weaker_sandbox=true runs without (docs/executor.md)" if "weak" in message else ""
            raise UserError(f"executor: {message['failed']}{advice}")

    def _revive(self) -> None:
        """The broker is gone: start another and repeat what was open, once."""
        status = self._process.poll()
        self._abandon()
        self._closed = False
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            self._closed = True
            raise UserError("executor: the broker process keeps dying; see the log, and `azr-jax doctor`")
        _LOG.warning("executor: the broker died (exit status %s); starting it again", status)
        time.sleep(0.1 * 2**self._restarts)
        self._start()
        for number, request in list(self._open.items()):
            if number in self._repeated:
                self._settle(number, Verdict("", "infra", reason="broker_died"))
            else:
                self._repeated.add(number)
                self._queue({"number": number, "request": request_to_wire(replace(request, id=""))})
