"""The canonical form: blind to names, hints, docstrings and layout, sharp on constants and structure."""

from __future__ import annotations

import builtins
import keyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.tasks.canonical import (
    canonical_input,
    canonical_program,
    distinct_inputs,
    program_key,
    task_key,
)
from azr_jax.tasks.kinds import Kind, Proposal, Task
from azr_jax.tasks.syntax import ProgramError

# {0}..{7} are names the program chose; any other eight distinct names must give the same canonical form.
TEMPLATES = (
    "def f({0}):\n    {1} = {0} + 1\n    return {1} * {0}",
    "import math as {0}\n\ndef {1}({2}, {3}=2):\n    return {0}.sqrt({2}) + {3}\n\n"
    "def f({4}):\n    return {1}({4}, {3}=3)",
    "def f({0}, *{1}, {2}=1, **{3}):\n    return [{4} for {4} in {0} if {4} in {1}] + list({3}) + [{2}]",
    "class {0}:\n    size = 1\n    def grow(self, {1}):\n        self.size += {1}\n        return self\n\n"
    "def f({2}):\n    return {0}().grow({2}).size",
    "{0} = 0\n\ndef {1}({2}):\n    global {0}\n    {0} += {2}\n\ndef f({3}):\n    {1}({3})\n    return {0}",
    "def f({0}):\n    {1} = 0\n    def {2}({3}):\n        nonlocal {1}\n        {1} += {3}\n    for {4} in {0}:\n"
    "        {2}({4})\n    return {1}",
    "def f({0}):\n    try:\n        return int({0})\n    except ValueError as {1}:\n        return str({1})",
    "def f({0}):\n    match {0}:\n        case {{'a': {1}, **{2}}}:\n            return {1}, {2}\n"
    "        case [{3}, *{4}]:\n            return {3}\n        case str() as {5}:\n            return {5}",
    "def f({0}):\n    if ({1} := len({0})) > 2:\n        return sorted({0}, key=lambda {2}: -{2})[:{1}]\n"
    "    return {{{3}: {4} for {3}, {4} in enumerate({0})}}",
    "from collections import Counter as {0}\n\ndef f({1}):\n    with {1} as ({2}, {3}):\n        del {2}\n"
    "    return {0}({3})",
)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,5}", fullmatch=True).filter(
    lambda name: (
        name != "f"
        and not keyword.iskeyword(name)
        and not keyword.issoftkeyword(name)
        and name not in dir(builtins)
        and not name.startswith("__")
        and name not in ("self", "size", "grow")
    )
)


@settings(max_examples=150)
@given(st.sampled_from(TEMPLATES), *[st.lists(NAMES, min_size=8, max_size=8, unique=True)] * 2)
def test_renaming_changes_nothing(template: str, first: list[str], second: list[str]) -> None:
    assert canonical_program(template.format(*first)) == canonical_program(template.format(*second))


def test_templates_differ_from_each_other() -> None:
    assert len({program_key(template.format(*"abcdeghi")) for template in TEMPLATES}) == len(TEMPLATES)


# Each program equals the first of its row, whatever it did to hide it.
SAME = (
    (
        "def f(a):\n    b = a + 1\n    return b",
        "def f(a):\n\n    b   =   (a+1)  # comment\n\n    return (b)\n",
        'def f(xs):\n    """Docstring."""\n    total = xs + 1\n    return total',
        "import typing\nfrom __future__ import annotations\ndef f(a: 'x') -> int:\n    b: int = a + 1\n    return b",
        "def f(a):\n    b: int\n    b = a + 1\n    pass\n    'bare text'\n    ...\n    return b",
        "def f(a):\n    b = a + 0x1; return b",
    ),
    (
        # One name reused in two functions, or two names: the same program (a global renaming would miss this).
        "def g(x):\n    return x + 1\ndef f(x):\n    return g(x)",
        "def g(y):\n    return y + 1\ndef f(x):\n    return g(x)",
        "def helper(f1):\n    return f1 + 1\ndef f(helper2):\n    return helper(helper2)",
    ),
    ("import math\ndef f(a):\n    return math.pi", "import math as m\ndef f(a):\n    return m.pi"),
    ("def f(a):\n    return 'ab'", 'def f(a):\n    return u"a" "b"'),
)
DIFFERENT = (
    "def f(a):\n    return a + 1",
    "def f(a):\n    return a + 2",
    "def f(a):\n    return a + 1.0",
    "def f(a):\n    return a + True",
    "def f(a):\n    return a + '1'",
    "def f(a):\n    return a + b'1'",
    "def f(a):\n    return a - 1",
    "def f(a):\n    return 1 + a",
    "def f(a):\n    return a + -1",
    "def f(a, b):\n    return a + b",
    "def f(a, b):\n    return b + a",
    "def f(a, b=1):\n    return a + b",
    "def f(a):\n    return a.upper()",
    "def f(a):\n    return a.lower()",
    "def f(a):\n    return len(a)",
    "def f(a):\n    return max(a)",
    "def f(a):\n    return [a]",
    "def f(a):\n    return (a,)",
    "def f(a):\n    return {a}",
    "def f(a):\n    a += 1\n    return a",
    "def f(a):\n    return f'{a}'",
    "def f(a):\n    return f'{a!r}'",
    "def f(a):\n    yield a",
    "import math\ndef f(a):\n    return math.floor(a)",
    "import cmath\ndef f(a):\n    return cmath.floor(a)",
    "from math import floor\ndef f(a):\n    return floor(a)",
    "x = 1\ndef f(a):\n    x = a\n    return x",
    "x = 1\ndef f(a):\n    global x\n    x = a\n    return x",
    "def f(a):\n    return [a for b in a]",
    "def f(a):\n    return [b for b in a]",
    "def f(a):\n    return 0x" + "f" * 6000,
)


@pytest.mark.parametrize("row", SAME, ids=range(len(SAME)))
def test_disguises_are_seen_through(row: tuple[str, ...]) -> None:
    assert len({canonical_program(program) for program in row}) == 1


def test_different_programs_have_different_forms() -> None:
    assert len({program_key(program) for program in DIFFERENT}) == len(DIFFERENT)


def test_unparsable_text_is_a_value_error() -> None:
    with pytest.raises(ProgramError, match="syntax_error"):
        canonical_program("def f(")
    with pytest.raises(ValueError):
        task_key(Task(Kind.DEDUCTION, "\x00"))


def test_key_is_stable_between_releases() -> None:
    """Keys live in checkpoints: changing the form silently would forget every program seen so far."""
    program = "import math\ndef f(a, b=2):\n    return [math.sqrt(x) for x in a if x > b]"
    assert program_key(program) == "c4e86a35ef6e85053829"


def test_what_counts_as_a_duplicate() -> None:
    one, renamed = "def f(a):\n    return a * 2", "def f(z):\n    return z * 2"
    for kind in (Kind.DEDUCTION, Kind.ABDUCTION):
        # A second input for a known program is a duplicate.
        assert task_key(Task(kind, one, input="1")) == task_key(Task(kind, renamed, input="2"))
        assert task_key(Proposal(kind, one, input="1")) == task_key(Task(kind, renamed, input="2", output="4"))
    assert task_key(Task(Kind.DEDUCTION, one)) != task_key(Task(Kind.ABDUCTION, one))

    pairs = (("1", "2"), ("[1, 2]", "[1, 2, 1, 2]"))
    task = Task(Kind.INDUCTION, one, pairs=pairs)
    assert task_key(task) == task_key(Task(Kind.INDUCTION, renamed, pairs=pairs[::-1]))
    assert task_key(task) == task_key(Proposal(Kind.INDUCTION, one, inputs=("[1,2]", " 1 ", "1"), message="other"))
    assert task_key(task) != task_key(Proposal(Kind.INDUCTION, one, inputs=("1", "[1, 3]")))
    assert task_key(task) != task_key(Proposal(Kind.INDUCTION, "def f(a):\n    return a * 3", inputs=("1", "[1, 2]")))


@given(st.text(max_size=30))
def test_canonical_input_never_raises_and_ignores_outer_space(text: str) -> None:
    assert canonical_input(text) == canonical_input(text)
    assert distinct_inputs([text, text, "1"])[0] == text


def test_distinct_inputs_keep_the_first_spelling_and_order() -> None:
    assert distinct_inputs(["2", "1,2", "2 ", "1, 2", "x("]) == ("2", "1,2", "x(")
