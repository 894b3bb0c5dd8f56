"""One run as the broker sees it: what to run, what came of it, how to read a child's bytes without trusting them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from azr_jax.executor import child
from azr_jax.executor.values import Arguments, canonical, parse_value

_HEADER = struct.Struct(">I")
_STATUS_OF_TAG = {
    child.ERROR: "error",
    child.MEMORY: "memory",
    child.LIMIT: "output_limit",
    child.UNSUPPORTED: "unsupported_value",
    child.SYNTAX: "syntax_error",
    child.NO_FUNCTION: "rejected",
}


@dataclass(frozen=True)
class Limits:
    """Limits of one run, from ExecutorConfig."""

    cpu_seconds: float
    wall_seconds: float
    memory_mb: int
    output_chars: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `value` and `text` (its canonical form) are set when status is "ok"; `worker` ran it."""

    status: str
    value: Any = None
    text: str = ""
    error_type: str = ""
    reason: str = ""
    worker: int = 0


@dataclass(eq=False)
class Run:
    """One program on one argument list, to be run in a fresh process.

    Runs of the same `group`, all of one program, may share a process where that shows nothing of one to another.

    `done` gets the outcome, exactly once, unless `wanted` says before the start that nobody needs it any more. `used`
    is shared by runs that must each go to a different worker: those taken so far. `retried` counts faults of ours.
    """

    program: str
    arguments: Arguments
    done: Callable[[Outcome], None]
    group: object = None
    used: set[int] | None = None
    urgent: bool = False
    wanted: Callable[[], bool] = field(default=lambda: True)
    retried: int = 0


class Reply:
    """Frames from a child, fed as bytes arrive. Violations of the framing end it: `broken` is then set."""

    def __init__(self, expected: int, max_chars: int) -> None:
        self.frames: list[tuple[bytes, str]] = []
        self.finished = False
        self.broken = False
        self._expected = expected
        self._max_bytes = 1 + 4 * max_chars + 400  # tag, UTF-8 text, an exception's name
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Take in bytes; never raises."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size and not self.broken:
            size = _HEADER.unpack_from(self._buffer)[0]
            if self.finished or not 0 < size <= self._max_bytes:
                self.broken = True
            elif len(self._buffer) < _HEADER.size + size:
                return
            else:
                self._take(self._buffer[_HEADER.size : _HEADER.size + size])
                self._buffer = self._buffer[_HEADER.size + size :]

    def _take(self, frame: bytes) -> None:
        tag, body = frame[:1], frame[1:]
        if tag == child.DONE:
            self.finished = True
        elif len(self.frames) < self._expected:
            self.frames.append((tag, body.decode("utf-8", "replace")))
        else:
            self.broken = True


def read_outcome(tag: bytes, text: str, max_chars: int, worker: int) -> Outcome:
    """Turn one frame into an outcome: parse a claimed value as untrusted text and render it anew. Never raises."""
    if tag == child.VALUE:
        try:
            value = parse_value(text)
            rendered = canonical(value)
        except ValueError:
            return Outcome("crashed", reason="malformed_result", worker=worker)
        if len(rendered) > max_chars:
            return Outcome("output_limit", worker=worker)
        return Outcome("ok", value=value, text=rendered, worker=worker)
    status = _STATUS_OF_TAG.get(tag)
    if status is None:
        return Outcome("crashed", reason="malformed_result", worker=worker)
    name = "".join(letter for letter in text if letter.isprintable())[:80] if tag == child.ERROR else ""
    return Outcome(status, error_type=name, reason="no_f" if tag == child.NO_FUNCTION else "", worker=worker)
