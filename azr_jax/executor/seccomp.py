"""The system-call filter of a child, as classic BPF bytes (no library needed, one `prctl` installs it).

Default deny: whatever is not listed fails with EPERM. What is left is memory that is never executable, the child's own
socket, and the way out. There is no file, socket, process, thread, signal, clock or random source to ask for.
Tables for x86-64 and aarch64; on another machine there is no filter (`filter_program` returns None).
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import NamedTuple


class _Machine(NamedTuple):
    """Numbers that differ between architectures (linux/audit.h, asm/unistd.h)."""

    audit_arch: int
    free: tuple[int, ...]  # allowed with any argument
    own_socket: tuple[int, ...]  # allowed if the first argument is the task's descriptor
    no_exec: tuple[int, ...]  # allowed if the third argument asks for no executable memory


_MACHINES = {
    # brk munmap mremap madvise | rt_sigreturn futex restart_syscall exit exit_group
    "x86_64": _Machine(0xC000003E, (12, 11, 25, 28, 15, 202, 219, 60, 231), (0, 1), (9, 10)),
    "aarch64": _Machine(0xC00000B7, (214, 215, 216, 233, 139, 98, 128, 93, 94), (63, 64), (222, 226)),
}  # own_socket: read write; no_exec: mmap mprotect

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000  # linux/seccomp.h
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_2 = 0, 4, 16, 32  # offsets in struct seccomp_data, low words first
_X32_BIT = 0x40000000
_PROT_EXEC = 4
_CALLS = 470  # about as many as Linux has


def filter_program(task_fd: int, machine: str = "") -> bytes | None:
    """`struct sock_filter[]` for this (or the named) machine; None where we have no table of call numbers."""
    table = _MACHINES.get(machine or os.uname().machine)
    if table is None or sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return None  # a 32-bit process on a 64-bit kernel has other numbers, too
    rules = {number: [_op(_RETURN, _ALLOW)] for number in table.free}
    rules |= {number: _test(_ARGUMENT_0, _op(_JUMP_EQUAL, task_fd, 0, 1)) for number in table.own_socket}
    rules |= {number: _test(_ARGUMENT_2, _op(_JUMP_ANY_BIT, _PROT_EXEC, 1, 0)) for number in table.no_exec}
    ranges = [(0, [_op(_RETURN, _DENY)])]  # from this number up to the next range's: what to do
    for number in sorted(rules):
        if ranges[-1][0] == number:
            ranges.pop()
        ranges += [(number, rules[number]), (number + 1, [_op(_RETURN, _DENY)])]
    ranges.append((_X32_BIT, [_op(_RETURN, _KILL)]))
    code = [_op(_LOAD, _ARCH), _op(_JUMP_EQUAL, table.audit_arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    return b"".join(code + _search(ranges))


def _search(ranges: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """A search tree over ranges of call numbers, wide ones near the root.

    When a filter is installed, the kernel runs it on the number of every call there is, so a child waits for the sum of
    all path lengths. A chain of comparisons would take twice as long.
    """
    if len(ranges) == 1:
        return ranges[0][1]
    middle = min(_CALLS, ranges[-1][0]) + ranges[0][0]
    split = min(range(1, len(ranges)), key=lambda index: abs(2 * ranges[index][0] - middle))
    below, above = _search(ranges[:split]), _search(ranges[split:])
    return [_op(_JUMP_AT_LEAST, ranges[split][0], len(below), 0), *below, *above]


def _test(offset: int, test: bytes) -> list[bytes]:
    """Allow the call if `test` on an argument falls through to the next instruction, else deny it."""
    return [_op(_LOAD, offset), test, _op(_RETURN, _ALLOW), _op(_RETURN, _DENY)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
