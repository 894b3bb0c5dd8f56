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


def filter_program(task_fd: int, machine: str = "") -> bytes | None:
    """`struct sock_filter[]` for this (or the named) machine; None where we have no table of call numbers."""
    table = _MACHINES.get(machine or os.uname().machine)
    if table is None or sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return None  # a 32-bit process on a 64-bit kernel has other numbers, too
    code = [_op(_LOAD, _ARCH), _op(_JUMP_EQUAL, table.audit_arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    code += [_op(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _op(_RETURN, _KILL)]
    for number in table.free:
        code += [_op(_JUMP_EQUAL, number, 0, 1), _op(_RETURN, _ALLOW)]
    for number in table.own_socket:
        code += _if_number(number, _ARGUMENT_0, _op(_JUMP_EQUAL, task_fd, 0, 1))
    for number in table.no_exec:
        code += _if_number(number, _ARGUMENT_2, _op(_JUMP_ANY_BIT, _PROT_EXEC, 1, 0))
    return b"".join([*code, _op(_RETURN, _DENY)])


def _if_number(number: int, offset: int, test: bytes) -> list[bytes]:
    """Allow call `number` if `test` on an argument falls through to the next instruction, else deny it."""
    return [_op(_JUMP_EQUAL, number, 0, 4), _op(_LOAD, offset), test, _op(_RETURN, _ALLOW), _op(_RETURN, _DENY)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
