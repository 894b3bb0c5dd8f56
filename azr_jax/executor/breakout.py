"""A worker's test child: locked down, it tries what no program may do. The sandbox holds only if all of it fails."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable

CLOCK = "read the clock"  #: reported apart: hiding it needs more than the filter


def escapes() -> list[str]:
    """Names of the attempts that succeeded in this process; empty inside a whole sandbox. Harmless outside one."""
    return [name for name, attempt in _ATTEMPTS.items() if _succeeds(attempt)]


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, MemoryError, ValueError):
        return False
    return True


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


_ATTEMPTS: dict[str, Callable[[], object]] = {
    "read a file": lambda: os.close(os.open("/proc/self/status", os.O_RDONLY)),
    "list a folder": lambda: os.listdir("/"),
    "write a file": lambda: os.close(os.open("/tmp/azr-jax-breakout", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)),
    "open a socket": lambda: socket.socket().close(),
    "start a process": _fork,
    "signal a process": lambda: os.kill(1, 0),
    "map executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    "draw randomness": lambda: os.urandom(1),
    "change its priority": lambda: os.nice(1),
    CLOCK: time.monotonic,
}
