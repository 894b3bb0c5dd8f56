# ruff: noqa: E501 - one attack a line reads better than a folded one
"""Judging: right answers in every spelling score, and every attack on the judge scores nothing."""

from __future__ import annotations

import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.executor import ExecutorPool, Request

ADD = "def f(a, b=2):\n    return a + b"
SAME = "def f(x):\n    return x"
PAIRS = (("1", "2"), ("2", "4"), ("3", "6"))

#: (gold, answer): none of these answers is the gold value written as a literal.
DEDUCTION_ATTACKS = [
    ("42", "eval(gold_output)"), ("42", "__import__('os').getpid() and 42"), ("42", "40 + 2"), ("42", "6 * 7"),
    ("42", "0) or (True"), ("42", "42 if True else 0"), ("42", "(lambda: 42)()"), ("42", "int('42')"),
    ("42", "[42][0]"), ("42", "42\n42"), ("42", "42; 42"), ("42", "x := 42"), ("42", "42,"), ("42", "'42'"),
    ("42", "42.0"), ("42", "b'42'"), ("42", "[42]"), ("42", "{42}"), ("42", "f(1)"), ("42", "..."), ("42", ""),
    ("42", "type('T', (), {'__eq__': lambda s, o: True})()"), ("42", "mock.ANY"), ("42", "~-43"), ("42", "42 or 1"),
    ("42", "42 == 42"), ("42", "__builtins__"), ("42", "f'{42}'"), ("42", "*[42]"), ("42", "await 42"),
    ("42", "yield 42"), ("42", "\x0042"), ("42", "\ud800"), ("42", "-" * 30000 + "42"), ("42", "(" * 5000 + "42"),
    ("42", "[" * 150 + "42" + "]" * 150), ("42", "1" * 30000), ("42", "4 2"), ("42", "042"), ("42", "globals()"),
    ("True", "1"), ("1", "True"), ("1", "1.0"), ("0.0", "-0.0"), ("0", "False"), ("None", "'None'"), ("None", "0"),
    ("'a'", "a"), ("'a'", "['a']"), ("'a'", "b'a'"), ("'a'", "'a' 'a'"), ("'é'", "'e\u0301'"), ("[1, 2]", "(1, 2)"),
    ("(1,)", "(1)"), ("[1, 2]", "[2, 1]"), ("[1, 2]", "[*[1, 2]]"), ("[1, 2]", "list((1, 2))"), ("[1]", "[True]"),
    ("{1: 2}", "{**{1: 2}}"), ("{1: 2}", "dict([(1, 2)])"), ("{1: 2}", "{1.0: 2}"), ("{1, 2}", "[1, 2]"),
    ("{1, 2}", "frozenset({1, 2})"), ("set()", "{}"), ("float('nan')", "nan == nan"), ("float('inf')", "1e999 - 1"),
    ("1.5", "1.5000001"), ("[float('nan')]", "[None]"), ("'" + "x" * 500 + "'", "'" + "x" * 200 + "..." + "'"),
]  # fmt: skip

#: (program, gold, answer): the answer is no literal argument list, or the program does not give the gold for it.
ABDUCTION_ATTACKS = [
    (SAME, "5", "5) or (True"), (SAME, "5", "5)\nTrue #"), (SAME, "5", "'a') or (True"), (SAME, "5", "*[5]"),
    (SAME, "5", "**{'x': 5}"), (SAME, "5", "(lambda: 5)()"), (SAME, "5", "f(5)"), (SAME, "5", "x=5, x=5"),
    (SAME, "5", "setattr(f, '__code__', (lambda *a: 5).__code__)"), (SAME, "5", "globals().update(f=lambda *a: 5)"),
    (SAME, "5", "mock.ANY"), (SAME, "5", "type('T', (), {'__eq__': lambda s, o: True})()"), (SAME, "5", "y for y in [5]"),
    (SAME, "5", "5 for f in [1]"), (SAME, "5", "5, 6"), (SAME, "5", ""), (SAME, "5", "5.0"), (SAME, "5", "True"),
    (SAME, "5", "y=5"), (SAME, "5", "5)(5"), (SAME, "5", "5); (5"), (SAME, "5", "#"), (SAME, "5", "2 + 3"),
    (ADD, "5", "3, 2, 1"), (ADD, "5", "'3', '2'"), (ADD, "5", "b=5"), (ADD, "True", "1, 0"),
    ("def f(x):\n    while True: pass", "5", "5"), ("def f(x):\n    raise ValueError", "5", "5"),
    ("class A:\n    def __eq__(s, o): return True\ndef f(x):\n    return A()", "5", "5"),
    ("class I(int): pass\ndef f(x):\n    return I(5)", "5", "5"), ("def f(x", "5", "5"),
]  # fmt: skip

#: Programs that pass no hidden pair by rights: what they want is to be told that they did.
INDUCTION_ATTACKS = [
    "class A:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x):\n    return A()",
    "class I(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x):\n    return I(0)",
    "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x):\n    return A",
    "def f(x):\n    __builtins__.__dict__['print'] = None\n    raise SystemExit(0)",
    "import sys\ndef f(x):\n    return sys._getframe(1).f_locals",
    "def f(x):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        t = e.__traceback__.tb_frame.f_back\n    return [v for v in t.f_locals.values() if v in (2, 4, 6)]",
    "def f(x):\n    while True: pass",
    "def f(x):\n    return 'PASS'",
    "def f(x):\n    return None",
    "def f(x):\n    return float(x * 2)",
    "def f(x):\n    return str(x * 2)",
    "def f(x):\n    return (x * 2,)",
    "def f(x):\n    return x",
    "def f(x): return x *",
    "f = 2",
    "def g(x):\n    return x * 2",
    "def f():\n    return 2",
    "",
    "import gc\ndef f(x):\n    return [o for o in gc.get_objects() if o == '6']",
    "def f(x):\n    exit(0)",
]  # fmt: skip


def test_there_are_enough_attacks():
    assert len(DEDUCTION_ATTACKS) + len(ABDUCTION_ATTACKS) + len(INDUCTION_ATTACKS) >= 60


def test_attacks_score_nothing(pool):
    requests = [
        *(Request(f"d{n}", "judge", "deduction", output=g, answer=a) for n, (g, a) in enumerate(DEDUCTION_ATTACKS)),
        *(
            Request(f"a{n}", "judge", "abduction", program=p, output=g, answer=a)
            for n, (p, g, a) in enumerate(ABDUCTION_ATTACKS)
        ),
        *(Request(f"i{n}", "judge", "induction", pairs=PAIRS, answer=a) for n, a in enumerate(INDUCTION_ATTACKS)),
    ]
    for request, verdict in zip(requests, pool.run_all(requests), strict=True):
        assert verdict.status == "ok", (request, verdict)
        assert not verdict.correct, request
        assert verdict.reason, "a wrong answer has a reason"
        assert verdict.passed == 0
        if request.kind == "induction":
            assert verdict.total == len(PAIRS)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", " 42 "), ("42", "(42)"), ("42", "0x2a"), ("42", "4_2"), ("42", "42 # done"), ("42", "+42"), ("-1", "- 1"),
        ("'a'", '"a"'), ("'a'", "'''a'''"), ("'ab'", "'a' 'b'"), ("'a'", "'\\x61'"), ("[1, 2]", "[1,2,]"),
        ("{1, 2}", "{2, 1}"), ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}"), ("set()", "set()"), ("(1,)", "1,"),
        ("frozenset({1})", "frozenset([1])"), ("float('inf')", "inf"), ("float('-inf')", "-inf"), ("float('inf')", "1e999"),
        ("float('nan')", "nan"), ("[float('nan')]", "[float('NaN')]"), ("(1+2j)", "1+2j"), ("1e16", "1e16"),
        ("10000000000000000.0", "1e16"), ("None", "None"), ("True", "True"), ("b'a'", "b'\\x61'"), ("''", "''"),
    ],
)  # fmt: skip
def test_right_answers_score(gold, answer, pool):
    assert pool.run_all([Request("", "judge", "deduction", output=gold, answer=answer)])[0].correct


def test_abduction_takes_any_preimage_and_keywords(pool):
    answers = ["3, 2", "3", "b=4, a=1", "10, b=-5", "2, (3)"]
    requests = [Request("", "judge", "abduction", program=ADD, output="5", answer=answer) for answer in answers]
    assert all(verdict.correct for verdict in pool.run_all(requests))


def test_induction_counts_every_pair(pool):
    right = Request("", "judge", "induction", pairs=PAIRS, answer="def f(x):\n    return x * 2")
    half = Request("", "judge", "induction", pairs=PAIRS, answer="def f(x):\n    return [2, 4, 5][x - 1]")
    partial = Request("", "judge", "induction", pairs=PAIRS, answer="def f(x):\n    return 6 // (x - 1)")
    verdicts = pool.run_all([right, half, partial])
    assert [(v.correct, v.passed, v.total) for v in verdicts] == [(True, 3, 3), (False, 2, 3), (False, 0, 3)]
    assert verdicts[2].error_type == "ZeroDivisionError"


def test_a_task_with_a_bad_gold_is_rejected_not_judged(pool):
    requests = [
        Request("", "judge", "deduction", output="f(x)", answer="1"),
        Request("", "judge", "abduction", program=SAME, output="<object>", answer="1"),
        Request("", "judge", "induction", pairs=(("1", "x"),), answer=SAME),
        Request("", "judge", "induction", pairs=(("a b", "1"),), answer=SAME),
        Request("", "judge", "induction", pairs=(), answer=SAME),
    ]
    assert {(v.status, v.reason, v.correct) for v in pool.run_all(requests)} == {("rejected", "bad_gold", False)}


def test_numeric_python_is_pythons_own_equality():
    with ExecutorPool(ExecutorConfig(workers=1, numeric="python")) as pool:
        pairs = [
            ("1", "True"),
            ("1", "1.0"),
            ("0.0", "-0.0"),
            ("[1, {2}]", "[1.0, {2.0}]"),
            ("1", "(1+0j)"),
            ("1", "'1'"),
        ]
        requests = [Request("", "judge", "deduction", output=a, answer=b) for a, b in pairs]
        assert [verdict.correct for verdict in pool.run_all(requests)] == [True] * 5 + [False]


def test_induction_counts_up_to_the_second_timeout_in_the_order_of_the_pairs(pool):
    """Which pairs were run beside each other, and which ended first, must not show."""
    pairs = tuple((str(n), str(n)) for n in range(40))
    for hangs, passed in (("(1, 30)", 29), ("(3, 1)", 2), ("(39,)", 39)):
        answer = f"def f(x):\n    while x in {hangs}: pass\n    return x"
        (verdict,) = pool.run_all([Request("1", "judge", "induction", pairs=pairs, answer=answer)])
        assert (verdict.status, verdict.correct, verdict.reason) == ("ok", False, "timeout")
        assert (verdict.passed, verdict.total) == (passed, 40)
