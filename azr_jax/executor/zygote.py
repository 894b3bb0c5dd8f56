"""A worker: a small warm interpreter, started by exec, that forks one locked-down child for each task.

Its life: import the modules that programs may use, run the code paths of a task many times so that a fork finds them
settled, freeze the heap, give up its own powers, fork a test child that tries to break out, report what holds, and
then serve. Fork commands bring the task's socket as a passed descriptor; the worker never reads from it, so no task
text and no neighbour's data is in the memory that children inherit. It dies with the broker.

The control socket is standard input; the one argument is the memory limit of a run in bytes.
"""

from __future__ import annotations

import codecs
import gc
import importlib
import json
import os
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from azr_jax.executor import breakout, child, heap, lockdown, plain
from azr_jax.executor.heap import moved, renewed

COMMAND = struct.Struct("=cIII")  #: FORK, KILL or TELL; number of the run; CPU limit in seconds; bytes of the task
REPORT = struct.Struct("=IiI")  #: number of the run, wait status, 0 or pid
FORK, KILL, TELL = b"F", b"K", b"P"
FORK_FAILED, PID = -1, -2  #: instead of a wait status; with PID, the third field is the child's pid
_NOT_YET = 2**31 - 1  # a pid that no process has
_LONGEST_WAIT_MICROSECONDS = 20_000

#: Modules a program may import: pure computation, no clock, no randomness, no access to the outside.
OFFERED = (
    "__future__", "abc", "array", "bisect", "cmath", "collections", "collections.abc", "copy", "dataclasses",
    "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "queue",
    "re", "statistics", "string", "textwrap", "types", "typing", "unicodedata",
)  # fmt: skip
#: Codecs that str.encode looks for only when asked; files are out of reach by then.
_CODECS = (
    "ascii us-ascii latin-1 latin1 iso-8859-1 iso8859-1 cp1252 windows-1252 cp437 utf-8 utf8 utf-8-sig utf-16 utf16 "
    "utf-16-le utf-16-be utf-32 utf32 utf-32-le utf-32-be utf-7 unicode-escape raw-unicode-escape rot13 rot_13 hex "
    "base64 punycode"
).split()
_WARM_UP_ROUNDS = 64
_READ_BYTES = 4096
_WARM_UP_PROGRAM = """
import math, re
from collections import Counter
def f(a, b='x', *c, **d):
    t = [i * 2 for i in range(10) if i % 3]
    s = {k: v for k, v in zip('abc', t)}
    for k in sorted(s):
        s[k] += len(str(k)) + math.gcd(4, 6)
    try:
        return [s, sum(t), ''.join(reversed('abc')), {1, 2}, (1.5, None, True), f'{b:>3}'.strip(), a[0]]
    except IndexError as error:
        raise ValueError(str(error)) from None
"""

#: Builds, for a descriptor, the functions that read a task of a given size and run it.
TaskServer = Callable[[int], tuple[Callable[[int], bytes], Callable[[bytes], None]]]


def main() -> None:
    """Entry point of the worker process."""
    control = socket.socket(fileno=0)
    kept = _warm_interpreter()  # while files can still be read
    lock = renewed(lockdown.child_lock)()
    layers = lockdown.lock_worker(int(sys.argv[1]))
    layers["parent_death_signal"] = lockdown.die_with_parent()
    os.environ.clear()
    task_server = _settle_in()
    escapes = _self_test(lock)
    refusal = lockdown.filter_refusal()
    layers |= {"seccomp": not refusal, "no_clock": True}
    for name in escapes:
        layers[breakout.OTHER_LAYERS.get(name, "seccomp")] = False
    fault = refusal or ", ".join(name for name in escapes if name != breakout.CLOCK)
    control.sendall(json.dumps({"layers": layers, "fault": fault}).encode() + b"\n")
    _serve(control, _child(lock, task_server))
    del kept


def _warm_interpreter() -> list[Any]:
    """Import what programs may use and walk the code paths of a run; what comes back is to be kept for good."""
    seed = int(os.environ["PYTHONHASHSEED"])
    kept: list[Any] = [_pad(seed)]
    _import_offered()
    kept.append(_pad(seed + 1))
    _warm_up()
    kept.append(_pad(seed + 2))
    gc.collect()
    kept.append(heap.settle())
    return kept


def _settle_in() -> TaskServer:
    """Offer programs their modules; the last steps before forks, which are to find the heap at rest."""
    child.offer_modules(OFFERED)
    task_server = _warm_up()
    gc.collect()
    gc.freeze()
    return task_server


def _import_offered() -> None:
    # statistics wants `random` for sampling; a program must find no source of chance, so it gets an empty module.
    sys.modules["random"] = types.ModuleType("random")
    register = os.register_at_fork
    os.register_at_fork = lambda **hooks: None  # threading, which queue needs, would slow every fork
    for name in OFFERED:
        importlib.import_module(name)
    os.register_at_fork = register
    del sys.modules["random"]
    for name in _CODECS:
        codecs.lookup(name)


def _warm_up() -> TaskServer:
    """Run what every child runs, until specialised code, caches and free lists are as a child will need them."""
    build_encoder, build_runner = renewed(plain.encoder), renewed(child.task_runner)
    build_reader, build_sender = renewed(child.task_reader), renewed(child.sender)
    encode = build_encoder()

    def task_server(descriptor: int) -> tuple[Callable[[int], bytes], Callable[[bytes], None]]:
        return build_reader(descriptor), build_runner(encode, build_sender(descriptor))

    good = child.pack_task(_WARM_UP_PROGRAM, [(([1],), {}), (([],), {"b": "y"})], 4096)
    bad = child.pack_task("def f(:", [((), {})], 4096)
    ours, theirs = socket.socketpair()
    read_task, run_task = task_server(theirs.fileno())
    for _ in range(_WARM_UP_ROUNDS):
        for task in (good, bad):
            ours.sendall(task)
            run_task(read_task(len(task)))
            ours.recv(_READ_BYTES)
    ours.close()
    theirs.close()
    return task_server


def _pad(seed: int) -> list[Any]:
    """Objects of every small size class, a varying number of each: no two workers give an object the same address.

    Address-space randomisation moves whole pages; this moves objects within them, so that `id([]) % 64` is no constant.
    """
    makers: list[Callable[[], Any]] = [list, dict, set, float, object, lambda: (object(),), lambda: [None]]
    makers += [partial(bytes, size) for size in range(1, 480, 16)]
    kept = []
    for make in makers:
        seed = (seed * 1103515245 + 12345) % 2**31  # any cheap sequence will do
        kept += [make() for _ in range(seed >> 16 & 63)]
    return kept


def _self_test(lock: Callable[[int, int, int], None]) -> list[str]:
    """Fork a child, lock it, let it try to break out; what it managed, or what else went wrong."""
    worker = os.getpid()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            lock(theirs.fileno(), 5, worker)
            said = breakout.escapes()
        except BaseException as error:
            said = [f"{type(error).__name__}: {error}"]
        os.write(lockdown.TASK_FD, json.dumps(said).encode())
        os._exit(0)
    theirs.close()
    status = os.waitpid(pid, 0)[1]
    report = ours.recv(4096)
    ours.close()
    return json.loads(report) if status == 0 and report else [f"the test child ended with status {status}"]


def _serve(control: socket.socket, become_child: Callable[[int, int, int], None]) -> None:
    """Fork, kill and reap until the control socket closes.

    Children are reaped in the handler of SIGCHLD, which interrupts the wait for the next command: there is nothing else
    to wait for, and a run takes few calls. A signal in the instant before the wait begins does not interrupt it, hence
    the limit to its length.
    """
    running: dict[int, int] = {}  # pid -> number of the run; never empty while one may have to be reaped
    early: dict[int, int] = {}  # pid -> status of what ended before its pid was in `running`
    wait, fork, close = moved(os.waitpid, -1, os.WNOHANG), moved(os.fork), moved(os.close)
    receive, send, unpack, pack = moved(control.recvmsg, COMMAND.size, 64), control.sendall, COMMAND.unpack, REPORT.pack

    def reap(signum: int, frame: Any) -> None:
        while running:
            try:
                pid, status = wait()
            except ChildProcessError:  # none left
                return
            if pid == 0:
                return
            if pid in running:
                send(pack(running.pop(pid), status, 0))
            else:
                early[pid] = status

    signal.signal(signal.SIGCHLD, reap)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, _LONGEST_WAIT_MICROSECONDS))
    try:
        while True:
            try:
                message, rights, _, _ = receive()
            except BlockingIOError:
                continue
            if len(message) < COMMAND.size:
                return
            what, number, cpu_seconds, size = unpack(message)
            if what != FORK:
                _look_up(control, what, number, running)
                continue
            task_fd = int.from_bytes(rights[0][2][:4], sys.byteorder)
            running[_NOT_YET] = number
            try:
                pid = fork()
            except OSError:
                send(pack(number, FORK_FAILED, 0))
            else:
                if pid == 0:
                    become_child(task_fd, cpu_seconds, size)
                running[pid] = number
                if pid in early:
                    send(pack(running.pop(pid), early.pop(pid), 0))
            del running[_NOT_YET]
            close(task_fd)
    finally:  # the broker is gone, and takes the children along
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        running.pop(_NOT_YET, None)
        for pid in running:
            _kill(pid)


def _look_up(control: socket.socket, what: bytes, number: int, running: dict[int, int]) -> None:
    """Kill a child, or tell its pid, by the number of its run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # nothing is reaped meanwhile, so the pid stays its own
    for pid, run in running.items():
        if run == number and what == KILL:
            _kill(pid)
        elif run == number:
            control.sendall(REPORT.pack(number, PID, pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _child(lock: Callable[[int, int, int], None], task_server: TaskServer) -> Callable[[int, int, int], None]:
    """Build the life of a child: lock down, serve the task, end. Never returns; no cleanup code of a program runs."""
    worker, leave = os.getpid(), moved(os._exit)
    read_task, run_task = task_server(lockdown.TASK_FD)

    def become_child(task_fd: int, cpu_seconds: int, size: int) -> None:
        status = 1
        try:
            lock(task_fd, cpu_seconds, worker)
            run_task(read_task(size))
            status = 0
        finally:
            leave(status)

    return become_child


def _kill(pid: int) -> None:
    """Kill an unreaped child and, should it have made any, its process group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:  # it is not in a group of its own yet
        os.kill(pid, signal.SIGKILL)


def floor(seconds: float, program: str) -> None:
    """For the benchmark: fork, compile, run and exit in this warm interpreter, unisolated; print runs a second."""
    import time

    out = sys.stdout
    kept = _warm_interpreter()
    _settle_in()
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        pid = os.fork()
        if pid == 0:
            namespace: dict[str, Any] = {}
            exec(compile(program.replace("{n}", str(done)), "<program>", "exec"), namespace)
            namespace["f"]([1, 2, 3])
            os._exit(0)
        os.waitpid(pid, 0)
        done += 1
    del kept
    out.write(json.dumps(done / (time.monotonic() - start)))
    out.flush()
