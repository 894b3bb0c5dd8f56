"""Static rules: reason codes, what stays allowed, and that no text whatever makes them raise."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from azr_jax.tasks.canonical import canonical_program
from azr_jax.tasks.kinds import Kind, Proposal
from azr_jax.tasks.syntax import MAX_PROGRAM_CHARS, ProgramError
from azr_jax.tasks.validation import BANNED_MODULES, BANNED_NAMES, proposal_rejection, static_rejection

ACCEPTED = {
    "identity": "def f(a):\n    return a",
    "helper": "def g(x):\n    return x + 1\n\ndef f(a):\n    return g(a)",
    "class": "class P:\n    def __init__(self, x):\n        self.x = x\n\ndef f(a):\n    return P(a).x",
    "nested": "def f(a):\n    def f(b):\n        return b\n    return f(a)",
    "imports": "import math, re\nfrom heapq import heappop\nfrom typing import List\n\ndef f(a: List):\n    return a",
    "future": "from __future__ import annotations\ndef f(a):\n    return a",
    "shadowed parameter": "def f(input, vars):\n    open = input + 1\n    return open + vars",
    "shadowed in comprehension": "def f(a):\n    return [dir for dir in a]",
    "lambda": "def f(a):\n    return (lambda exec: exec + 1)(a)",
    "decorated": "import functools\n\n@functools.cache\ndef f(a):\n    return a",
    "hash and id are the gate's": "def f(a):\n    return hash(a) + id(a)",
    "super": "class A(list):\n    def __init__(self):\n        super().__init__()\n\ndef f(a):\n    return len(A())",
    "dunder text": "def f(a):\n    return '__init__' + '__custom__' + a",
    "no parameter": "def f():\n    return 1",
    "match": "def f(a):\n    match a:\n        case {'k': v, **w}:\n            return w\n        case [_, *y]:\n"
    "            return y",
    "attribute named like a module": "class T:\n    time = 3\n\ndef f(a):\n    return T.time",
}

REJECTED = {
    "": "no_f",
    "x = 1": "no_f",
    "f = lambda a: a": "no_f",
    "async def f(a):\n    return a": "no_f",
    "if True:\n    def f(a):\n        return a": "no_f",
    "class f:\n    pass": "no_f",
    "def f(a):\n    return a\n\ndef f(a):\n    return 2": "several_f",
    "def f(a):\n    return a\n\nf = 3": "several_f",
    "import math as f\n\ndef f(a):\n    return a": "several_f",
    "def g():\n    global f\n    f = 2\n\ndef f(a):\n    return g()": "several_f",
    "def f(a)\n    return a": "syntax_error",
    "def f(a):\n    return a\x00": "syntax_error",
    "def f(a):\n    return '\ud800'": "syntax_error",
    "def f(a):\n    return " + "9" * 5000: "syntax_error",
    "def f(a):\n    return " + "(" * 300 + ")" * 300: "syntax_error",
    "def f(a):\n    return a" + "+a" * 200: "too_deep",
    "def f(a):\n    return " + "-" * 9000 + "1": "too_deep",
    "def f(a):\n    return a" + ".b" * 6000: "too_deep",
    "#" * (MAX_PROGRAM_CHARS + 1): "too_long",
    "import os\ndef f(a):\n    return a": "banned_module:os",
    "import os.path\ndef f(a):\n    return a": "banned_module:os",
    "from os import path\ndef f(a):\n    return a": "banned_module:os",
    "def f(a):\n    import random as r\n    return r.random()": "banned_module:random",
    "from . import x\ndef f(a):\n    return a": "banned_module:relative",
    "from collections import _sys\ndef f(a):\n    return a": "banned_module:sys",
    "import re\ndef f(a):\n    return re.enum.sys.argv": "banned_module:sys",
    "def f(a):\n    return eval(a)": "banned_name:eval",
    "def f(a):\n    return [exec for x in a]": "banned_name:exec",
    "def f(a):\n    e = eval\n    return e(a)": "banned_name:eval",
    "if 0:\n    open = 1\ndef f(a):\n    return open(a)": "banned_name:open",
    "def f(a, b=__import__('os')):\n    return a": "banned_name:__import__",
    "def f(a: eval('1')):\n    return a": "banned_name:eval",
    "@eval\ndef f(a):\n    return a": "banned_name:eval",
    "def f(a):\n    return __builtins__": "banned_name:__builtins__",
    "def f(a):\n    return a.__class__.__bases__": "banned_name:__bases__",
    "def f(a):\n    return f.__globals__": "banned_name:__globals__",
    "def f(a):\n    return (i for i in a).gi_frame": "banned_name:gi_frame",
    "from operator import attrgetter\ndef f(a):\n    return a": "banned_name:attrgetter",
    "def f(a):\n    return '{0.__globals__}'.format(f)": "banned_name:__globals__",
    "def f(a):\n    match a:\n        case object(__dict__=d):\n            return d": "banned_name:__dict__",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    assert static_rejection(ACCEPTED[name]) is None


@pytest.mark.parametrize("program", REJECTED, ids=lambda program: ascii(program[:40]))
def test_rejected_with_reason(program: str) -> None:
    assert static_rejection(program) == REJECTED[program]


@pytest.mark.parametrize("module", sorted(BANNED_MODULES))
def test_every_banned_module_however_imported(module: str) -> None:
    body = "def f(a):\n    return a"
    for statement in (f"import {module}", f"import {module} as m", f"from {module} import x", f"import {module}.y"):
        assert static_rejection(f"{statement}\n{body}") == f"banned_module:{module}"


def test_paper_list_is_covered() -> None:
    fig_8 = "logging random multiprocessing pebble subprocess threading datetime time hashlib calendar bcrypt os sys"
    assert set(fig_8.split()) <= BANNED_MODULES


@pytest.mark.parametrize("name", sorted(BANNED_NAMES))
def test_every_banned_name(name: str) -> None:
    assert static_rejection(f"def f(a):\n    return {name}(a)") == f"banned_name:{name}"


# Text that looks like Python: tokens at random reach further into the rules than characters at random.
TOKENS = st.sampled_from(
    (
        "def f ( a ) : return \n     class lambda for in if else import os from . as global nonlocal x y 1 'a' f'{x}' "
        "[ ] { } , = := * ** + - not await yield match case _ try with del @ ; \\ # \x00 \ud800 é __import__ eval"
    ).split(" ")
)
PYTHONISH = st.lists(TOKENS, max_size=40).map(" ".join)
ANY_TEXT = st.text(st.characters(), max_size=200)


@settings(max_examples=400)
@given(st.one_of(ANY_TEXT, PYTHONISH, PYTHONISH.map(lambda text: f"def f(a):\n    return a\n{text}")))
@example("")
@example("\ufeffdef f(a):\n    return a")
def test_never_raises_and_acceptance_implies_a_canonical_form(program: str) -> None:
    reason = static_rejection(program)
    try:
        form = canonical_program(program)
    except ProgramError as error:
        assert reason == error.reason
    else:
        assert form.isascii() or form.isprintable()
        assert reason not in ("syntax_error", "too_long", "too_deep")


@settings(max_examples=25)
@given(st.sampled_from(["not ", "-", "(", "[", "{", "lambda:", "x=", "a.", "f(", "1+", "if a:\n ", "[x for x in "]))
def test_deep_nesting_is_a_reason_and_not_a_crash(piece: str) -> None:
    for repeats in (50, 99, 150, 1000, (MAX_PROGRAM_CHARS - 1) // len(piece)):
        program = piece * repeats + "1"
        assert static_rejection(program) in ("syntax_error", "too_deep", "no_f")


def test_no_warning_escapes(recwarn: pytest.WarningsRecorder) -> None:
    assert static_rejection("def f(a):\n    return '\\d' + a") is None
    assert not recwarn.list


def test_rules_never_run_the_program() -> None:
    assert static_rejection("raise SystemExit\ndef f(a):\n    return a") is None
    assert static_rejection("while True:\n    pass\ndef f(a):\n    return a") is None


def test_proposal_rules() -> None:
    program = "def f(a):\n    return a"
    assert proposal_rejection(Proposal(Kind.DEDUCTION, program, input="1"), 4) is None
    assert proposal_rejection(Proposal(Kind.ABDUCTION, "import os\n" + program), 4) == "banned_module:os"
    enough = Proposal(Kind.INDUCTION, program, inputs=("1", "2", "[1,2]", "[1, 2, 3]"))
    assert proposal_rejection(enough, 4) is None
    repeated = Proposal(Kind.INDUCTION, program, inputs=("1", " 1", "[1,2]", "[1, 2]"))
    assert proposal_rejection(repeated, 4) == "too_few_inputs"
    assert proposal_rejection(repeated, 2) is None
