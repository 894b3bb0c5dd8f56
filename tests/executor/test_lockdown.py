"""The sandbox layers: the filter's decisions for both architectures, the probe, and refusing to run without them."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool, Request, broker, lockdown, sandbox_layers, seccomp

ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
X86, ARM = 0xC000003E, 0xC00000B7
#: name -> number on x86-64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h)
FORBIDDEN = {
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "socket": (41, 198), "connect": (42, 203),
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tgkill": (234, 131), "ptrace": (101, 117), "prctl": (157, 167),
    "seccomp": (317, 277), "unlink": (87, None), "unlinkat": (263, 35), "mkdirat": (258, 34), "mount": (165, 40),
    "setitimer": (38, 103), "nanosleep": (35, 101), "clock_gettime": (228, 113), "getrandom": (318, 278),
    "getpid": (39, 172), "ioctl": (16, 29), "dup": (32, 23), "pipe2": (293, 59), "sendmsg": (46, 211),
    "recvmsg": (47, 212), "sendto": (44, 206), "io_uring_setup": (425, 425), "bpf": (321, 280), "keyctl": (250, 219),
    "userfaultfd": (323, 282), "process_vm_readv": (310, 270), "perf_event_open": (298, 241), "unshare": (272, 97),
    "setns": (308, 268), "prlimit64": (302, 261), "memfd_create": (319, 279), "shmget": (29, 194),
    "pidfd_getfd": (438, 438), "rt_sigaction": (13, 134), "wait4": (61, 260), "getppid": (110, 173),
}  # fmt: skip


def decide(code: bytes, arch: int, number: int, *args: int) -> int:
    """Interpret a classic BPF program on one system call; the value it returns."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    accumulator = index = 0
    while True:
        operation, if_true, if_false, value = struct.unpack_from("=HBBI", code, 8 * index)
        index += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x06:
            return value
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            index += if_true if test else if_false


@pytest.mark.parametrize(("machine", "arch", "column"), [("x86_64", X86, 0), ("aarch64", ARM, 1)])
def test_filter_decisions(machine, arch, column):
    code = seccomp.filter_program(3, machine)
    assert code is not None and len(code) % 8 == 0
    read, write, mmap, mprotect, leave = {
        "x86_64": (0, 1, 9, 10, 231), "aarch64": (63, 64, 222, 226, 94),
    }[machine]  # fmt: skip
    for name, numbers in FORBIDDEN.items():
        if numbers[column] is not None:
            assert decide(code, arch, numbers[column], 3, 3, 3) == DENY, name
    assert decide(code, arch, leave) == ALLOW
    for call in (read, write):
        assert decide(code, arch, call, 3) == ALLOW
        assert [decide(code, arch, call, other) for other in (0, 1, 2, 4, 2**32 - 1)] == [DENY] * 5
    for call in (mmap, mprotect):
        assert decide(code, arch, call, 0, 4096, 3) == ALLOW
        assert [decide(code, arch, call, 0, 4096, bits) for bits in (4, 5, 7)] == [DENY] * 3
    assert decide(code, arch, 10_000) == DENY


def test_filter_kills_on_another_architecture():
    code = seccomp.filter_program(3, "x86_64")
    assert code is not None
    assert decide(code, 0x40000003, 231) == KILL, "32-bit calls have other numbers"
    assert decide(code, X86, 0x40000000 | 1, 3) == KILL, "x32"
    assert seccomp.filter_program(3, "riscv64") is None


def test_layers_hold_here():
    layers = sandbox_layers()
    assert set(layers) == {*lockdown.MANDATORY, *lockdown.OPTIONAL}
    assert all(layers[name] for name in lockdown.MANDATORY), "the tests need a machine with a whole sandbox"


def test_pool_says_which_layers_it_has(pool):
    assert all(pool.layers[name] for name in lockdown.MANDATORY)


def test_a_missing_mandatory_layer_is_refused_unless_allowed(monkeypatch):
    """The broker's decision, taken on workers that claim to lack a layer."""
    said: list[dict] = []

    class Worker:
        ready = True
        layers = dict.fromkeys(lockdown.MANDATORY, True) | {"seccomp": False}
        fault = "read a file"

    class Crew:
        workers = [Worker()]

    refusing = object.__new__(broker.Broker)
    refusing._config, refusing._crew, refusing._greeted, refusing._open = (
        {"allow_weaker_sandbox": False},
        Crew(),
        False,
        True,
    )
    monkeypatch.setattr(broker.Broker, "_send", lambda self, message: said.append(message))
    refusing._greet()
    assert "seccomp (read a file)" in said[0]["failed"] and not refusing._open
    refusing._config, refusing._greeted, refusing._open = {"allow_weaker_sandbox": True}, False, True
    refusing._greet()
    assert said[1]["layers"]["seccomp"] is False and refusing._open


def test_refusal_reaches_the_user_as_one_line(monkeypatch):
    monkeypatch.setattr("azr_jax.executor.link.start_python", _fake_broker)
    with pytest.raises(UserError, match="seccomp.*allow_weaker_sandbox") as caught:
        ExecutorPool(ExecutorConfig(workers=1))
    assert "\n" not in str(caught.value)


def _fake_broker(module, arguments, control, quiet):
    import subprocess
    import sys

    line = '{"failed": "sandbox layers missing on this machine: seccomp", "weak": true}\\n'
    code = f"import os, time; os.write(0, b'{line}'); time.sleep(30)"
    return subprocess.Popen([sys.executable, "-c", code], stdin=control.fileno())


def test_limits_are_the_configured_ones():
    config = ExecutorConfig(workers=1, memory_mb=64, output_chars=20)
    programs = {
        "def f(x):\n    return 'x' * 18": "ok",
        "def f(x):\n    return 'x' * 19": "output_limit",
        "def f(x):\n    return len(bytearray(48 << 20))": "ok",
        "def f(x):\n    return len(bytearray(80 << 20))": "memory",
    }
    with ExecutorPool(config) as small, ExecutorPool(replace(config, memory_mb=256)) as large:
        requests = [Request("", "run", program=program, input="1") for program in programs]
        assert [verdict.status for verdict in small.run_all(requests)] == list(programs.values())
        assert large.run_all(requests)[3].status == "ok"
