"""The hostile corpus: contained, with a documented status, nothing left over, and the next plain task right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from azr_jax.executor import Request
from tests.executor.corpus import CASES

PLAIN = Request("plain", "run", program="def f(x):\n    return sorted({str(x), 'a'})", input="7")


def families() -> dict[int, list[int]]:
    """Pid -> pids of its children, for all processes."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if (state, parent) != ("Z", "1"):  # the first process inherits these; in a container that may be pytest
                children.setdefault(int(parent), []).append(int(entry.name))
    return children


def descendants(pid: int) -> set[int]:
    """Pids of all processes below `pid`."""
    children = families()
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


@pytest.fixture(scope="module")
def verdicts(pool):
    """All cases at once, so that loops and bombs run beside everything else."""
    requests = [Request(case.name, "run", program=case.program, input="7") for case in CASES]
    before = len(descendants(os.getpid()))
    found = {verdict.id: verdict for verdict in pool.run_all(requests)}
    assert len(descendants(os.getpid())) <= before, "a process was left behind"
    return found


def test_corpus_is_large_and_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES) >= 120


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contained(case, verdicts):
    verdict = verdicts[case.name]
    assert verdict.status in case.statuses, verdict
    if verdict.status == "ok" and case.output:
        assert verdict.output == case.output


def test_nothing_was_written(verdicts):
    assert not [path for path in ("/tmp/azr-pwned", "/tmp/azr-pwned-dir", "/dev/shm/azr-pwned") if os.path.exists(path)]
    assert not os.path.lexists("/tmp/azr-link")


def test_next_plain_task_is_right(pool, verdicts):
    assert pool.run_all([PLAIN])[0].output == "['7', 'a']"
    stats = pool.stats()
    assert stats.get("status_infra", 0) == 0
    assert stats["restarts"] == 0, "no program can take its worker down"


def test_validate_refuses_or_contains_all(pool):
    """Through the gate the same programs may only end worse for their author, or show a stable plain value."""
    requests = [Request(case.name, "validate", program=case.program, input="7") for case in CASES]
    for case, verdict in zip(CASES, pool.run_all(requests), strict=True):
        assert verdict.status != "infra", verdict
        if verdict.status == "ok":
            assert "ok" in case.statuses
            assert not case.output or verdict.output == case.output


LEAKS = {
    "global counter": "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n",
    "mutable default": "def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)",
    "function attribute": "def f(x):\n    f.n = getattr(f, 'n', 0) + 1\n    return f.n",
    "rebinds itself": "def f(x):\n    global f\n    f = lambda x: 666\n    return 1",
    "class attribute": "class A:\n    n = 0\ndef f(x):\n    A.n += 1\n    return A.n",
    "module attribute": "import math\ndef f(x):\n    math.n = getattr(math, 'n', 0) + 1\n    return math.n",
    "module alias": "from collections import Counter as C\ndef f(x):\n    C.n = getattr(C, 'n', 0) + 1\n    return C.n",
    "builtins": "def f(x):\n    b = __builtins__\n    b.n = getattr(b, 'n', 0) + 1\n    return b.n",
    "decimal context": (
        "import decimal\ndef f(x):\n    c = decimal.getcontext()\n    c.prec += 1\n    return c.prec - 28"
    ),
    "module dict": "import string\ndef f(x):\n    d = vars(string)\n    d['n'] = d.get('n', 0) + 1\n    return d['n']",
    "lru cache": (
        "import functools\nn = []\n@functools.lru_cache\ndef g(x):\n    n.append(x)\n    return len(n)\n"
        "def f(x):\n    return g(x)"
    ),
    "type registry": (
        "import collections.abc as a\nclass B: pass\ndef f(x):\n    n = issubclass(B, a.Sized)\n"
        "    a.Sized.register(B)\n    return 1 + n"
    ),
    "generator frame": (
        "def g():\n    yield\ndef f(x):\n    b = g().gi_frame.f_builtins\n"
        "    b['n'] = b.get('n', 0) + 1\n    return b['n']"
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_no_state_passes_between_runs(name, pool):
    """Different inputs of one program submitted together all see a first call."""
    requests = [Request(str(x), "run", program=LEAKS[name], input=str(x)) for x in range(6)]
    assert [verdict.output for verdict in pool.run_all(requests)] == ["1"] * 6
