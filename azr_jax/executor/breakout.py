"""A worker's test child: locked down, it tries what no program may do. The sandbox holds only if all of it fails."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable

CLOCK = "read the clock"
MEMORY = "map a terabyte"
#: The layer that an attempt tries, where that is not the system-call filter. Hiding the clock needs more than that.
OTHER_LAYERS = {CLOCK: "no_clock", MEMORY: "rlimits"}
_FILE = "/tmp/azr-jax-breakout"


def escapes() -> list[str]:
    """Names of the attempts that succeeded in this process; empty inside a whole sandbox. Harmless outside one."""
    return [name for name, attempt in _ATTEMPTS.items() if _succeeds(attempt)]


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:  # refused, in whatever words
        return False
    return True


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _write() -> None:
    os.close(os.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(_FILE)


_ATTEMPTS: dict[str, Callable[[], object]] = {
    "read a file": lambda: os.close(os.open("/", os.O_RDONLY)),
    "list a folder": lambda: os.listdir("/"),
    "write a file": _write,
    "open a socket": lambda: socket.socket().close(),
    "start a process": _fork,
    "signal a process": lambda: os.kill(0, 0),  # its own group
    "map executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    "draw randomness": lambda: os.urandom(1),
    "change its priority": lambda: os.nice(1),
    CLOCK: time.monotonic,
    MEMORY: lambda: mmap.mmap(-1, 1 << 40).close(),
}
