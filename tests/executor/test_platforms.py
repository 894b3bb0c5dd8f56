"""Machines that lack something: the pool says what, refuses or goes on as configured, and its verdicts stay right.

Each machine is this one with something taken away from every process of the pool before our code loads: Linux without
system-call filters, without ctypes, without /proc, with a processor we have no table for; and macOS, as far as its
differences from Linux can be acted out.
"""

from __future__ import annotations

import os

import pytest

import azr_jax
from azr_jax.config import ExecutorConfig
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool, Request, lockdown, sandbox_layers, worker

NO_FILTERS = """
import ctypes, struct
libc = ctypes.CDLL(None)
numbers = {"x86_64": 157, "aarch64": 167}  # prctl
code = b"".join(struct.pack("=HBBI", *op) for op in [
    (0x20, 0, 0, 0), (0x15, 0, 3, numbers[os.uname().machine]),  # another call: allow
    (0x20, 0, 0, 16), (0x15, 0, 1, 22), (0x06, 0, 0, 0x50000 | 22),  # PR_SET_SECCOMP: EINVAL, as of an old kernel
    (0x06, 0, 0, 0x7FFF0000),
])
filter = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(filter)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
libc.prctl(22, 2, program, 0, 0)  # refused to a worker, which has it from the broker
"""
NO_CTYPES = "sys.modules['ctypes'] = None"
NO_PROC = """
import builtins
real_open = builtins.open
def open_but_proc(path, *args, **options):
    if str(path).startswith('/proc'):
        raise FileNotFoundError(2, 'No such file or directory', path)
    return real_open(path, *args, **options)
builtins.open = open_but_proc
"""
RISCV = """
real_uname = os.uname
os.uname = lambda: type('uname', (), {'machine': 'riscv64', 'release': real_uname().release})
"""
MACOS = (
    NO_PROC
    + """
import ctypes, resource, selectors, socket, subprocess, time
sys.platform = 'darwin'
for name in ('sched_getaffinity', 'setresuid', 'setresgid'):
    delattr(os, name)
real_gettime, real_setrlimit, real_socketpair = time.clock_gettime, resource.setrlimit, socket.socketpair
def own_clocks_only(clock):
    if clock < 0:
        raise OSError(22, 'Invalid argument')
    return real_gettime(clock)
def no_space_limit(which, limits):
    if which == resource.RLIMIT_AS:
        raise ValueError('current limit exceeds maximum limit')
    real_setrlimit(which, limits)
def small_sockets(*args):
    pair = real_socketpair(*args)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return pair
time.clock_gettime, resource.setrlimit, socket.socketpair = own_clocks_only, no_space_limit, small_sockets
"""
)
SLEEPER = """
def f(x):
    for cls in ().__class__.__base__.__subclasses__():
        if cls.__name__ == 'BuiltinImporter':
            cls.load_module('time').sleep(600)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make every process of pools to come run a piece of code of the test's before any of ours.

    They find a package `azr_jax` that does so and then goes on as the real one.
    """
    (tmp_path / "azr_jax").mkdir()
    monkeypatch.setattr(worker, "_ROOT", str(tmp_path))

    def become(prelude):
        (tmp_path / "azr_jax" / "__init__.py").write_text(
            f"exec({prelude!r}, {{'os': __import__('os'), 'sys': __import__('sys')}})\n"
            f"__path__ = {azr_jax.__path__!r}\n"
            f"import azr_jax.executor.worker\nazr_jax.executor.worker._ROOT = {str(tmp_path)!r}\n"
        )

    return become


def run(pool, *programs):
    return pool.run_all([Request("", "run", program=program, input="7") for program in programs])


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        (NO_FILTERS, "missing on this machine: seccomp .the kernel or the container takes no filters: Invalid arg"),
        (NO_CTYPES, "missing on this machine: no_new_privs, seccomp .this Python has no ctypes"),
        (RISCV, "missing on this machine: seccomp .no table of system calls for riscv64"),
        (MACOS, "missing on this machine: rlimits, no_new_privs, seccomp .not Linux"),
    ],
    ids=["no filters", "no ctypes", "riscv64", "macos"],
)
def test_a_weaker_machine_is_refused_with_the_reason_or_used_with_a_warning(machine, prelude, message, caplog):
    machine(prelude)
    with pytest.raises(UserError, match=message) as caught:
        ExecutorPool(ExecutorConfig(workers=1))
    assert "allow_weaker_sandbox" in str(caught.value) and "\n" not in str(caught.value)
    with ExecutorPool(ExecutorConfig(workers=1, wall_seconds=3.0, allow_weaker_sandbox=True)) as pool:
        assert "seccomp" in caplog.text and not pool.layers["seccomp"]
        assert set(pool.layers) == {*lockdown.MANDATORY, *lockdown.OPTIONAL}
        plain, raises, spin, sleep, size, text = run(
            pool,
            "def f(x):\n    return {x, 'a'}",
            "def f(x):\n    return 1 // (x - 7)",
            "def f(x):\n    while True: pass",
            SLEEPER,
            f"s = '{'a' * 30000}'\ndef f(x):\n    return len(s)",
            "def f(x):\n    return '\\U0001f600' * 4000",
        )
    assert plain.output == "{7, 'a'}"
    assert raises.error_type == "ZeroDivisionError"
    assert (spin.status, sleep.status) == ("timeout", "timeout")
    assert (size.output, len(text.output)) == ("30000", 4002)


def test_without_proc_only_the_clock_is_seen(machine):
    machine(NO_PROC)
    layers = sandbox_layers()
    assert {layer for layer, holds in layers.items() if not holds} <= {"no_clock", "unprivileged_user", "landlock"}
    assert not layers["no_clock"]
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        assert run(pool, "def f(x):\n    return x")[0].output == "7"


def test_root_that_may_not_change_user_goes_on(machine):
    machine("def refuse(*ids): raise PermissionError(1, 'Operation not permitted')\nos.setgroups = os.setuid = refuse")
    layers = sandbox_layers()
    assert layers["unprivileged_user"] is (os.geteuid() != 0)
    assert all(layers[layer] for layer in lockdown.MANDATORY)


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.executable", "/dev/null/python")
    with pytest.raises(UserError, match="cannot start a process"):
        ExecutorPool(ExecutorConfig(workers=1))
