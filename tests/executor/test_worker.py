"""One worker without a broker: it forks, reports and reaps by itself, and its children are as it promises."""

from __future__ import annotations

import os
import select
import signal
import time
from types import SimpleNamespace

import pytest

from azr_jax.executor import child as child_side
from azr_jax.executor import heap, seccomp
from azr_jax.executor.crew import Crew
from azr_jax.executor.worker import ChildProcess, Worker, environment, task_sockets
from tests.executor.test_lockdown import X86, decide

PATIENCE = 60.0  # seconds; nothing here takes a thousandth of it on an idle machine


@pytest.fixture(scope="module")
def worker():
    worker = Worker(1, memory_mb=256)
    try:
        hear(worker, until=lambda reports: worker.ready)
        yield worker
    finally:
        worker.stop()


def hear(worker, until):
    """Reports of the worker, waited for without ever sending it a command."""
    reports, end = [], time.monotonic() + PATIENCE
    while not until(reports):
        assert select.select([worker.control], [], [], end - time.monotonic())[0], "the worker says nothing"
        more = worker.receive()
        assert more is not None, "the worker is gone"
        reports += more
    return reports


def start(worker, number, program, argument=0, cpu_cap=5):
    ours, theirs = task_sockets()
    task = child_side.pack_task(program, [((argument,), {})], 4096)
    ours.send(task)
    child = ChildProcess(number, worker, [None], ours, 4096, cpu_cap)
    worker.fork(child, theirs, len(task))
    theirs.close()
    return child


def frames(child):
    child.receive()
    child.link.close()
    child.worker.children.pop(child.number)
    return child.reply.frames


def test_every_child_is_reported_though_no_command_follows(worker):
    for number in range(200):
        child = start(worker, number, f"def f(x):\n    return x + {number}", 1)
        assert hear(worker, until=len) == [(number, 0, 0)]
        assert frames(child) == [(child_side.VALUE, str(number + 1))] and child.reply.finished


def test_children_that_end_together_are_all_reported(worker):
    children = {number: start(worker, number, "def f(x):\n    return x", number) for number in range(1000, 1012)}
    reports = hear(worker, until=lambda reports: len(reports) == len(children))
    assert sorted(reports) == [(number, 0, 0) for number in children]
    assert all(frames(child) == [(child_side.VALUE, str(number))] for number, child in children.items())


def test_nothing_is_left_for_the_next_child(worker):
    """What binds the worker's side of a run is made once; a child that spoils all it reaches spoils only its own."""
    spoil = (
        "import math, functools, builtins\n"
        "math.pi = 3\nbuiltins.len = builtins.repr = builtins.callable = lambda *a: 7\nfunctools.partial = None\n"
        "def f(x):\n"
        "    try:\n        1 / 0\n"
        "    except ZeroDivisionError as error:\n        frame = error.__traceback__.tb_frame\n"
        "    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if type(value).__name__ == 'partial':\n"
        "                value.__setstate__((lambda *a: 7, (), {}, {}))\n"
        "        frame = frame.f_back\n"
        "    return x"
    )
    frames_of = []
    for number, program in enumerate((spoil, "import math\ndef f(x):\n    return [math.pi > 3, len([x]), repr(x)]")):
        child = start(worker, 2000 + number, program, 5)
        hear(worker, until=len)
        frames_of.append(frames(child))
    assert frames_of[1] == [(child_side.VALUE, "[True, 1, '5']")]


def test_a_task_larger_than_any_buffer_arrives_whole(worker):
    child = start(worker, 3000, f"def f(x):\n    return len({'y' * 30_000!r}) + len(x)", "z" * 100_000)
    assert hear(worker, until=len)[0][1] == 0
    assert frames(child) == [(child_side.VALUE, "130000")]


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="no such signal")
def test_the_kernel_ends_what_we_forget_and_says_why(worker):
    child = start(worker, 4000, "def f(x):\n    while True: pass", cpu_cap=1)
    ((_, status, _),) = hear(worker, until=len)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    outcome = Crew._post_mortem(None, child, status)  # type: ignore[arg-type]
    assert (outcome.status, outcome.reason) == ("timeout", "cpu")
    assert Crew._post_mortem(None, child, signal.SIGKILL).reason == "killed_by_system"  # type: ignore[arg-type]
    frames(child)


def test_runs_stay_on_as_many_workers_as_there_are_cores():
    """Workers beyond those, kept for runs that must agree, would only push the others' memory out of the cache."""
    one, two = (SimpleNamespace(serial=n, ready=True, retired=False, children=[]) for n in (1, 2))
    crew = SimpleNamespace(workers=[one, two], _regular=1)
    one.children = [None] * 5
    assert Crew._choose(crew, None) is one  # type: ignore[arg-type]
    assert Crew._choose(crew, {1}) is two  # type: ignore[arg-type]
    crew._regular = 2
    assert Crew._choose(crew, None) is two  # type: ignore[arg-type]


def test_the_filter_denies_every_call_it_does_not_name():
    code = seccomp.filter_program(3, "x86_64")
    assert code is not None
    allowed = {12, 11, 25, 28, 15, 202, 219, 60, 231, 0, 1, 9, 10}
    for number in range(1000):
        assert (decide(code, X86, number, 3, 0, 0) == 0x7FFF0000) == (number in allowed), number


def test_a_stand_in_does_what_the_function_does():
    assert heap.moved(divmod)(7, 2) == heap.moved(divmod, 7)(2) == heap.moved(divmod, 7, 2)() == (3, 1)


def test_the_environment_holds_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert set(environment()) <= {"PYTHONHASHSEED", "LC_ALL", "LD_BIND_NOW", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
    assert environment()["PYTHONHASHSEED"] != environment()["PYTHONHASHSEED"]
