"""The broker's view of one worker process and of the children it forks."""

from __future__ import annotations

import _socket
import array
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from azr_jax.executor.runs import Reply, Run
from azr_jax.executor.zygote import COMMAND, FORK, KILL, REPORT, TELL

_ROOT = str(Path(__file__).parents[2])
_MAX_HASH_SEED = 2**32 - 1
_SOCKET_BYTES = 1 << 19
_SLEEPER_SHARE = 0.05  # of the wall time


def start_python(module: str, arguments: list[str], control: socket.socket, quiet: bool) -> subprocess.Popen[bytes]:
    """Start `module.main()` of this package in a new interpreter by exec, with `control` as its standard input."""
    return subprocess.Popen(
        python_command(f"from azr_jax.executor.{module} import main; main()", *arguments),
        stdin=control.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        env=environment(),
        cwd="/",
        start_new_session=True,  # Ctrl-C in the terminal is the trainer's to handle
    )


def python_command(code: str, *arguments: str) -> list[str]:
    """A command that runs `code`, which may import this package. Not -I: Python would then ignore PYTHONHASHSEED."""
    return [sys.executable, "-P", "-s", "-S", "-c", f"import sys; sys.path.insert(0, {_ROOT!r}); {code}", *arguments]


def environment() -> dict[str, str]:
    """What Python itself needs and nothing else, so that no secret of ours is in the memory of a program."""
    names = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some builds of Python need it to start at all
    return {
        "PYTHONHASHSEED": str(secrets.randbelow(_MAX_HASH_SEED) + 1),
        "LC_ALL": "C.UTF-8",
        "LD_BIND_NOW": "1",  # or each child looks up anew the functions of C that only children call
        **{name: os.environ[name] for name in names if name in os.environ},
    }


class ChildProcess:
    """A forked child: which runs it was given, what it has said, how long it may go on."""

    def __init__(
        self, number: int, worker: Worker, runs: list[Run], link: _socket.socket, max_chars: int, cpu_cap: int
    ) -> None:
        self.number = number
        self.worker = worker
        self.runs = runs
        self.link = link
        self.reply = Reply(len(runs), max_chars)
        self.cpu_cap = cpu_cap  # whole seconds after which the kernel kills it
        self.started = time.monotonic()
        self.progress = self.started  # when the current input began, as far as we know
        self.cpu_before = 0.0  # CPU time spent on the inputs before the current one
        self.pid = 0  # asked for only when it runs long
        self.slow = False
        self.heard = False  # whether the event loop listens to it
        self.killed = ""  # why we killed it

    def receive(self) -> bool:
        """Read what is there; whether it said anything new. Never raises on what a child can do."""
        seen = len(self.reply.frames)
        try:
            while not self.reply.broken:
                data = self.link.recv(65536)
                if not data:
                    break
                self.reply.feed(data)
        except OSError:  # nothing more for now, or a reset by a child that left data unread
            pass
        return len(self.reply.frames) > seen

    def cpu_seconds(self) -> float | None:
        """CPU time of the process so far; None if its pid is not known, it is gone, or this system does not tell."""
        if not self.pid:
            return None
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # CPU clock of another process (man clock_getcpuclockid)
        except OSError:
            return None

    def asleep(self, cpu: float, wall: float) -> bool:
        """Whether it waits for what will not come, rather than for its turn on a busy processor; given its times."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] == b"S"
        except OSError:  # no /proc: then one that had hardly any time is taken to sleep
            return cpu < _SLEEPER_SHARE * wall


def task_sockets() -> tuple[_socket.socket, _socket.socket]:
    """Our end, which never blocks, and the child's; a task, and a result, must fit in whole. Raises OSError."""
    ours, theirs = _socket.socketpair()  # bare ones: to dress them as Python's costs twice as much as making them
    ours.setblocking(False)
    if sys.platform != "linux":  # where it is far more by default, here 8 KB
        for end in (ours, theirs):
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, buffer, _SOCKET_BYTES)
    return ours, theirs


class Worker:
    """A worker process (`zygote.py`): fork commands out, exit reports in."""

    def __init__(self, serial: int, memory_mb: int) -> None:
        self.serial = serial
        self.forks = 0
        self.children: dict[int, ChildProcess] = {}
        self.ready = False
        self.retired = False  # gets no new runs, and goes when the last one is done
        self.layers: dict[str, bool] = {}
        self.fault = ""
        self.started = time.monotonic()
        self.control, theirs = socket.socketpair()
        self.control.setblocking(False)
        try:
            self.process = start_python("zygote", [str(memory_mb << 20)], theirs, quiet=True)
        except OSError:
            self.control.close()
            raise
        finally:
            theirs.close()
        self._buffer = b""

    def fork(self, child: ChildProcess, task_socket: _socket.socket, size: int) -> None:
        """Have a child forked that owns `task_socket`. Raises OSError if the worker is gone or stuck."""
        rights = array.array("i", [task_socket.fileno()])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        self.control.sendmsg([COMMAND.pack(FORK, child.number, child.cpu_cap, size)], ancillary)
        self.children[child.number] = child
        self.forks += 1

    def kill(self, child: ChildProcess) -> None:
        """Have a child killed; the worker knows whether its pid is still its own."""
        self._command(KILL, child.number)

    def ask_pid(self, child: ChildProcess) -> None:
        """Have the child's pid reported."""
        self._command(TELL, child.number)

    def _command(self, what: bytes, number: int) -> None:
        try:
            self.control.send(COMMAND.pack(what, number, 0, 0))
        except OSError:  # the worker is gone, which its control socket tells as well
            pass

    def receive(self) -> list[tuple[int, int, int]] | None:
        """Reports (number, status, pid if it was asked for) that came in; None if the worker is gone."""
        try:
            data = self.control.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        if not self.ready:
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                return []
            hello = json.loads(line)
            self.layers, self.fault, self.ready, self._buffer = hello["layers"], hello["fault"], True, rest
        whole = len(self._buffer) // REPORT.size * REPORT.size
        reports = list(REPORT.iter_unpack(self._buffer[:whole]))
        self._buffer = self._buffer[whole:]
        return reports

    def rss_mb(self) -> float:
        """Resident memory; 0 where /proc does not tell."""
        try:
            with open(f"/proc/{self.process.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
        except (OSError, IndexError):
            return 0.0

    def stop(self) -> None:
        """End the process and, through the kernel and its control socket, its children."""
        self.control.close()
        try:
            os.kill(self.process.pid, signal.SIGKILL)
        except OSError:
            pass
        self.process.wait()
        for child in self.children.values():
            child.link.close()
