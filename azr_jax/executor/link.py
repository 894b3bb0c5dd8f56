"""One broker process as the trainer sees it: its socket, the requests it has, and starting it again when it dies.

A broker is started by exec, so it inherits neither the memory nor the devices of this process, and it goes when its
socket closes, however this process ends. What it had in work when it died is repeated once and then answered `infra`.
Nothing here waits: `pool.py` decides when to read, write and give up.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
from typing import Any

from azr_jax.errors import UserError
from azr_jax.executor.protocol import Request, Verdict, request_to_wire
from azr_jax.executor.worker import start_python

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 2.0
_MAX_DEATHS = 3  # in a row
_CHUNK = 1 << 20  # bytes
_READ_BYTES = 1 << 16  # a larger buffer would be mapped and unmapped each time


class BrokerLink:
    """A broker with the given settings (a JSON-able dict), restarted as needed. Raises UserError if it cannot start."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.open: dict[int, Request] = {}  # requests without a verdict, by the pool's numbers
        self.layers: dict[str, bool] = {}  # of its sandbox; empty until it is ready
        self.stats: dict[str, float] | None = None  # the last ones it sent
        self.restarts = 0
        self.deaths_in_a_row = 0  # without a verdict in between
        self.outbox = bytearray()
        self._settings = settings
        self._repeated: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start the process; it is ready when `layers` has come in."""
        self.control, theirs = socket.socketpair()
        self.control.setblocking(False)
        try:
            self.process = start_python("broker", [json.dumps(self._settings)], theirs, quiet=False)
        except OSError as error:
            self.control.close()
            raise UserError(f"executor: cannot start a process ({error.strerror}); free memory or processes") from None
        finally:
            theirs.close()
        self._inbox = b""
        self.outbox.clear()
        self.layers = {}

    def ask(self, number: int, request: Request) -> None:
        """Queue a request."""
        self.open[number] = request
        self.send({"number": number, "request": request_to_wire(request)})

    def send(self, message: dict[str, Any]) -> None:
        """Queue any message."""
        self.outbox += json.dumps(message).encode() + b"\n"

    def answered(self, number: int) -> Request | None:
        """Take the request off the list; None if it is not open, because it was given up meanwhile."""
        self._repeated.discard(number)
        return self.open.pop(number, None)

    def write(self) -> bool:
        """Send what the socket takes; False if the broker is gone."""
        try:
            sent = self.control.send(memoryview(self.outbox)[:_CHUNK])
        except BlockingIOError:
            return True
        except OSError:
            return False
        del self.outbox[:sent]
        return True

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come in; None if the broker is gone."""
        try:
            data = self.control.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def restart(self) -> list[tuple[int, Verdict]]:
        """Start a new process for the one that died and repeat its requests; verdicts of those that may not be."""
        status = self.process.poll()
        self.kill()
        self.restarts += 1
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > _MAX_DEATHS:
            raise UserError("executor: the broker process keeps dying; see the log, and `azr-jax doctor`")
        _LOG.warning("executor: the broker died (exit status %s); starting it again", status)
        self.start()
        lost = []
        for number, request in list(self.open.items()):
            if number in self._repeated:
                lost.append((number, Verdict("", "infra", reason="broker_died")))
            else:
                self._repeated.add(number)
                self.ask(number, request)
        return lost

    def close(self) -> None:
        """Let the broker end itself and its workers; returns at once."""
        self.control.close()

    def wait(self) -> None:
        """After `close`: wait for the end, and help if it does not come."""
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once; its workers see their sockets close."""
        self.control.close()
        self.process.kill()
        self.process.wait()
