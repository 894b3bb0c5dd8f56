"""The executor on the command line: `azr-jax check`, a streaming JSON-lines service, and `azr-jax bench executor`."""

from __future__ import annotations

import json
import os
import platform
import select
import stat
import sys
from dataclasses import asdict, replace
from typing import Any, TextIO

from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor.bench import measure
from azr_jax.executor.pool import ExecutorPool
from azr_jax.executor.protocol import BadRequest, Request, Verdict, request_from_json, verdict_fields
from azr_jax.executor.sizing import default_workers

_READ_BYTES = 1 << 16
_MAX_PENDING = 1024  # requests in work before we stop reading
_MAX_LINE = 16 << 20  # bytes of one request


def check_command(path: str, config: ExecutorConfig, out: TextIO) -> int:
    """Answer the requests in `path` (or standard input for "-"), one JSON line each, as they become known.

    Returns 0; malformed lines are answered too (`rejected`, reason `bad_request: ...`). Raises UserError if the file
    cannot be read or the sandbox cannot be put up.
    """
    try:
        descriptor = sys.stdin.fileno() if path == "-" else os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"check: cannot read {path}: {reason}; give a file of JSON lines, or - for stdin", 2) from None
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UserError(f"check: {path} is a folder; give a file of JSON lines, or - for stdin", 2)
        with ExecutorPool(_alone(config)) as pool:
            _Conversation(pool, descriptor, out).hold()
    except BrokenPipeError:  # nobody reads our answers any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    finally:
        if path != "-":
            os.close(descriptor)
    return 0


def bench_command(config: ExecutorConfig, as_json: bool, out: TextIO, seconds: float = 4.0) -> int:
    """Measure the executor on this machine and print the figures, as one JSON object or as a table."""
    config = _alone(config)
    figures: dict[str, Any] = measure(config, seconds)
    figures |= {
        "workers": config.workers,
        "recompiles": 0,
        "device": f"{platform.machine()} cpu, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "kernel": platform.release()},
        "config": asdict(config),
    }
    if as_json:
        out.write(json.dumps(figures) + "\n")
    else:
        rows = [(name, value) for name, value in figures.items() if isinstance(value, int | float)]
        out.writelines(f"{name:<40} {value:>12.6g}\n" for name, value in rows)
    return 0


def _alone(config: ExecutorConfig) -> ExecutorConfig:
    """Without JAX beside it, the executor may have every core."""
    return replace(config, workers=config.workers or default_workers(beside_jax=False))


class _Conversation:
    """Lines in from a descriptor, answers out to a stream, side by side."""

    def __init__(self, pool: ExecutorPool, descriptor: int, out: TextIO) -> None:
        self._pool = pool
        self._descriptor = descriptor
        self._out = out
        self._ids: dict[str, tuple[Any, Request]] = {}  # number we gave -> id as written, request
        self._number = 0
        self._buffer = b""
        self._ended = False

    def hold(self) -> None:
        """Until the input has ended and everything is answered."""
        while not self._ended or self._pool.pending:
            reading = not self._ended and self._pool.pending < _MAX_PENDING
            sources: list[Any] = [self._pool, *([self._descriptor] if reading else [])]
            readable, _, _ = select.select(sources, [], [])
            if self._descriptor in readable:
                self._read()
            for verdict in self._pool.poll():
                self._answer(verdict)

    def _read(self) -> None:
        data = os.read(self._descriptor, _READ_BYTES)
        self._ended = not data
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        if self._ended and self._buffer:
            lines.append(self._buffer)
        elif len(self._buffer) > _MAX_LINE:
            raise UserError(f"check: a line is longer than {_MAX_LINE >> 20} MiB; requests are one JSON object a line")
        requests = []
        for line in lines:
            if line.strip():
                requests += self._request(line.decode("utf-8", "replace"))
        self._pool.submit(requests)

    def _request(self, line: str) -> list[Request]:
        try:
            identity, request = request_from_json(line)
        except BadRequest as error:
            identity = error.args[1] if len(error.args) > 1 else None
            self._write(identity, {"status": "rejected", "reason": f"bad_request: {error.args[0]}"})
            return []
        self._number += 1
        request = replace(request, id=str(self._number))
        self._ids[request.id] = identity, request
        return [request]

    def _answer(self, verdict: Verdict) -> None:
        identity, request = self._ids.pop(verdict.id)
        self._write(identity, verdict_fields(request, verdict))

    def _write(self, identity: Any, fields: dict[str, Any]) -> None:
        self._out.write(json.dumps({"id": identity, **fields}) + "\n")
        self._out.flush()
