"""Giving up powers: what a worker (zygote) drops once at its start, and what each child drops before it reads a task.

Every layer that can be inherited is set in the worker, because a child's time is what throughput is made of; the rest
(CPU limit, own session, parent-death signal, descriptors, system-call filter) is set in the child. Each function says
which layers it managed to put up; deciding whether that is enough is the broker's business (`MANDATORY`).
Namespaces, cgroups and chroot are not used: they need rights that containers and ordinary users do not have.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import struct
import sys
from collections.abc import Callable

from azr_jax.executor.heap import moved
from azr_jax.executor.seccomp import filter_program

try:
    import ctypes
except ImportError:  # a Python built without libffi cannot make the system calls that `os` lacks
    ctypes = None  # type: ignore[assignment]

TASK_FD = 3  #: the one descriptor a child keeps
NOBODY = 65534  #: the user that a worker started by root becomes
MANDATORY = ("rlimits", "no_new_privs", "seccomp")  #: without one of these nothing runs unless the config allows it
OPTIONAL = ("landlock", "not_dumpable", "parent_death_signal", "no_clock", "unprivileged_user")

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_MAP_FIXED = 0x10
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same on every architecture
_LANDLOCK_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI -> number of file-system rights (linux/landlock.h)


def lock_worker(memory_bytes: int) -> dict[str, bool]:
    """Drop, for this process and all its children, what a worker does not need; layer -> whether it holds.

    `memory_bytes` is address space for a run, on top of what the worker itself has mapped by now.
    """
    libc = _c_library()
    if libc is not None:
        _go_first_when_memory_ends()
        _blank_clock_page(libc)
    return {
        "unprivileged_user": _drop_user(),
        "rlimits": _limit(memory_bytes),
        "not_dumpable": libc is not None and libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0,
        "no_new_privs": libc is not None and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0,
        "landlock": libc is not None and _landlock(libc),
    }


def die_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent goes."""
    libc = _c_library()
    return libc is not None and libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) == 0


def filter_refusal() -> str:
    """Why children can get no system-call filter here; "" if they can. Changes nothing.

    Linux is offered a filter at address 0: if it takes filters at all, it says that it cannot read this one (EFAULT).
    """
    libc = _c_library()
    if libc is None:
        return "not Linux" if sys.platform != "linux" else "this Python has no ctypes"
    if filter_program(TASK_FD) is None:
        return f"no table of system calls for {os.uname().machine}"
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    answer = ctypes.get_errno()
    return "" if answer == errno.EFAULT else f"the kernel or the container takes no filters: {os.strerror(answer)}"


def child_lock() -> Callable[[int, int, int], None]:
    """Build the function a child calls first, with everything it needs prepared in the worker.

    The function takes (descriptor of the task, CPU limit in whole seconds, pid of the worker); afterwards the
    process has the one descriptor TASK_FD and may only compute. It raises OSError if a step fails. Where filters are
    refused altogether (`filter_refusal`) there is none: whether anything may run then is not decided here.
    """
    libc = _c_library()
    program = None if filter_refusal() else _filter_in_memory()
    limit_cpu = moved(resource.setrlimit, resource.RLIMIT_CPU)
    no_processes = moved(resource.setrlimit, resource.RLIMIT_NPROC, (0, 0))
    no_files = moved(resource.setrlimit, resource.RLIMIT_NOFILE, (TASK_FD + 1, TASK_FD + 1))
    own_group = moved(os.setpgid, 0, 0)  # no session of its own: that would defeat `setpriority`
    duplicate, close_below = moved(os.dup2), moved(os.closerange, 0, TASK_FD)
    close_above = moved(os.closerange, TASK_FD + 1, 64)  # the worker's own limit is 64 descriptors
    parent, leave, c_error = moved(os.getppid), os._exit, OSError
    prctl = libc.prctl if libc else None

    def lock(task_fd: int, cpu_seconds: int, worker_pid: int) -> None:
        own_group()
        if task_fd != TASK_FD:
            duplicate(task_fd, TASK_FD)
        close_below()
        close_above()
        limit_cpu((cpu_seconds, cpu_seconds + 1))  # the first ends it by SIGXCPU, which says why
        no_processes()
        no_files()
        if prctl is None:
            return
        prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if parent() != worker_pid:
            leave(1)  # the worker died before the line above: nobody would kill us
        if program and prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) != 0:
            raise c_error(ctypes.get_errno(), "seccomp")

    return lock


def _c_library() -> ctypes.CDLL | None:
    """The C library of a Linux process; None elsewhere, or where this Python cannot call it."""
    return ctypes.CDLL(None, use_errno=True) if ctypes is not None and sys.platform == "linux" else None


def _filter_in_memory() -> ctypes.Array[ctypes.c_char]:
    """`struct sock_fprog { unsigned short len; struct sock_filter *filter; }`, the filter right behind it."""
    code = filter_program(TASK_FD) or b""
    size = struct.calcsize("@HP")
    memory = ctypes.create_string_buffer(size + len(code))
    memory.raw = struct.pack("@HP", len(code) // 8, ctypes.addressof(memory) + size) + code
    return memory


def _drop_user() -> bool:
    """As root, become nobody for good; True if this process is an ordinary user afterwards."""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)  # for root: the real, the effective and the saved one
        except OSError:  # no such right, or no such user, in this container
            return False
    return os.geteuid() != 0


def _limit(memory_bytes: int) -> bool:
    """Resource limits that children inherit; False if one does not stick."""
    space = _mapped_bytes() + memory_bytes
    stack = 8 << 20
    wanted = {
        resource.RLIMIT_AS: space,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: stack,
    }
    held = True
    for which, limit in wanted.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(which, (limit, limit))
        except (OSError, ValueError):  # macOS: more is mapped already
            held = False
    return held and resource.getrlimit(resource.RLIMIT_AS)[1] <= space


def _mapped_bytes() -> int:
    """Address space this process has mapped; a guess where /proc is missing."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 64 << 20


def _go_first_when_memory_ends() -> None:
    """Make this process and its children the kernel's first choice when memory runs out, before the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # no /proc here; nothing depends on it
        pass


def _blank_clock_page(libc: ctypes.CDLL) -> None:
    """Put zeros over the page from which the C library reads the clock without a system call (vDSO data, "[vvar]").

    Zeros mean "this clock needs the system call", which the filter of a child then denies.
    """
    try:
        with open("/proc/self/maps") as maps:
            found = [line.split("-", 1) for line in maps if line.rstrip().endswith("[vvar]")]
    except OSError:
        return
    libc.mmap.restype = ctypes.c_void_p
    for start, rest in found:
        address, size = int(start, 16), int(rest.split(" ", 1)[0], 16) - int(start, 16)
        protection, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0))


def _landlock(libc: ctypes.CDLL) -> bool:
    """Deny every file, TCP port, outside signal and abstract socket, as far as the kernel's Landlock knows them."""
    libc.syscall.restype = ctypes.c_long
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    rights = (1 << _LANDLOCK_FS_RIGHTS.get(abi, 16)) - 1
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = struct.pack("=QQQ", rights, 3, 3)  # all rights on files; TCP bind, connect; sockets, signals
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    held = libc.syscall(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), 0) == 0
    os.close(ruleset)
    return held
