"""Arranging a worker's heap so that forking it costs less: a fork pays for every page mapped and every page written to.

Start-up leaves gaps all over the heap, and a child that fills them copies an old page for each object it makes. They
are filled beforehand, so that a child allocates side by side from fresh pages. And whatever lies in whole huge pages
is mapped as such where the kernel can do it (Linux 6.1), which leaves far fewer page-table entries to copy.
Neither changes what a program can see; both are measured in docs/executor.md.
"""

from __future__ import annotations

import marshal
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

try:
    import ctypes
except ImportError:  # a Python built without libffi
    ctypes = None  # type: ignore[assignment]

_LARGEST = 512  # bytes; up to here CPython serves objects from pools, one size each, in steps of _STEP
_STEP = 16
_POOL_BYTES = 16_384
_HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25  # linux/mman.h


def settle() -> list[bytes]:
    """Fill the gaps, ask for huge pages. The result must be kept as long as the process forks."""
    kept = []
    empty = sys.getsizeof(b"")
    for size in range(3 * _STEP, _LARGEST + 1, _STEP):
        in_a_row = last = 0
        while in_a_row < min(24, _POOL_BYTES // size - 2):  # one right behind the other: these are from a fresh pool
            kept.append(bytes(size - empty))
            in_a_row = in_a_row + 1 if id(kept[-1]) == last + size else 0
            last = id(kept[-1])
            if len(kept) > 100_000:  # another allocator: nothing to be had
                return []
    if ctypes is not None and sys.platform == "linux":
        _use_huge_pages(ctypes.CDLL(None))
    return kept


def moved(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A stand-in for a function of C (with its first arguments), in memory that was taken just now.

    To call a function is to count a reference to it, which copies the page it lies on. Functions of C lie where
    start-up put them, all over the heap; stand-ins made one after the other, after `settle`, lie side by side.
    """
    return partial(function, *arguments)


def renewed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function, those defined inside it included, in memory that was taken just now; see `moved`.

    What a function of Python touches when it runs, its code and constants, lies where importing its module put it.
    """
    code = marshal.loads(marshal.dumps(function.__code__))
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    try:
        with open("/proc/self/maps") as file:
            maps = [line.split() for line in file]
    except OSError:
        return
    for span, access, _, _, inode, *name in maps:
        start, end = (int(text, 16) for text in span.split("-"))
        start = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        end = end // _HUGE_PAGE * _HUGE_PAGE
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]) and start < end:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)
