# ruff: noqa: E501 - one attack a line reads better than a folded one
"""Values: encode, decode, canonical text, parsing and the rule of comparison."""

from __future__ import annotations

import ast
import json
import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from azr_jax.executor.plain import MAX_DEPTH, TooLarge, Unsupported, encoder
from azr_jax.executor.values import (
    MAX_TEXT,
    canonical,
    canonical_arguments,
    comparison_key,
    equal,
    parse_arguments,
    parse_value,
)

encode = encoder()
NUMBERS = st.one_of(
    st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.complex_numbers(allow_nan=True)
)
SCALARS = st.one_of(st.none(), NUMBERS, st.text(), st.binary(max_size=8))
HASHABLE = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(HASHABLE, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4),
    ),
    max_leaves=12,
)


def identical(a, b) -> bool:
    """The documented rule written the slow way: exact types, nan like nan, order only where it counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset | dict):
        left = list(a.items()) if isinstance(a, dict) else list(a)
        right = list(b.items()) if isinstance(b, dict) else list(b)
        for item in left:
            match = next((index for index, other in enumerate(right) if identical(item, other)), None)
            if match is None:
                return False
            del right[match]
        return not right
    return a == b


@given(VALUES)
@example([float("nan"), float("-inf"), -0.0, complex(-0.0, float("nan")), complex(1, -0.0), -0j])
@example({frozenset(): (), (): set(), b"": {}})
def test_decoding_inverts_encoding(value):
    assert identical(parse_value(encode(value, MAX_TEXT)), value)
    text = canonical(value)
    assert identical(parse_value(text), value)
    assert canonical(parse_value(text)) == text
    assert equal(value, parse_value(text))


@given(VALUES, VALUES)
@example(1, True)
@example({1: "a"}, {1.0: "a"})
@example({1, 2}, frozenset({1, 2}))
def test_equal_is_the_documented_rule(a, b):
    assert equal(a, a)
    assert equal(a, b) == identical(a, b) == equal(b, a)


@given(NUMBERS, NUMBERS)
@example(0.0, -0.0)
@example(1, 1 + 0j)
@example(2**53 + 1, float(2**53))
def test_python_numbers(a, b):
    both_nan = a != a and b != b and not isinstance(a, complex) and not isinstance(b, complex)
    if isinstance(a, complex) and (a.imag == 0 or a != a) or isinstance(b, complex) and (b.imag == 0 or b != b):
        return  # complex nan has no order to agree on
    assert equal(a, b, "python") == (a == b or both_nan)


@given(st.sets(st.one_of(st.integers(), st.text(max_size=3), st.tuples(st.integers()))))
def test_set_text_does_not_depend_on_insertion(values):
    backwards = list(values)[::-1]
    assert canonical(values) == canonical(set(backwards))


def test_canonical_examples():
    for value, text in [
        ({3, 1, 2}, "{1, 2, 3}"), ({10, 9}, "{9, 10}"), (set(), "set()"), (frozenset({2, 1}), "frozenset({1, 2})"),
        ((1,), "(1,)"), ((), "()"), ({"b": 1, "a": 2}, "{'b': 1, 'a': 2}"), (float("inf"), "float('inf')"),
        ([float("nan")], "[float('nan')]"), (-0.0, "-0.0"), ("a'b", '"a\'b"'), (b"x", "b'x'"), (1 + 2j, "(1+2j)"),
        ({"b", "a", 1, None}, "{1, None, 'a', 'b'}"),
    ]:  # fmt: skip
        assert canonical(value) == text


@given(st.text())
@example("(" * 190)
@example("-" * 20000 + "1")
@example("1" + "+1" * 15000)
@example("\0")
@example("'\\N{DIGIT ONE}'")
@example("0x" + "f" * 30000)
@example("{" * 90 + "}" * 90)
@example("float('nan')" * 50)
@example("{[]}")
@example("'\\d'")
def test_parsers_raise_nothing_but_value_error(text):
    for parse in (parse_value, parse_arguments):
        try:
            parse(text)
        except ValueError:
            pass


@given(
    st.recursive(
        st.sampled_from("1 a , ( ) [ ] { } : ' + - * . = f set() nan inf # \n".split(" ")),
        lambda s: st.lists(s).map("".join),
    )
)
def test_what_parses_is_plain(text):
    try:
        value = parse_value(text)
    except ValueError:
        return
    assert identical(parse_value(canonical(value)), value)


@given(st.text(alphabet="0123456789abef'\"[](){},:-+.jx_ ", max_size=30))
def test_agrees_with_literal_eval(text):
    try:
        expected = ast.literal_eval(text.strip())
    except Exception:
        return
    if expected is ... or "..." in text:
        return
    assert equal(parse_value(text), expected) or isinstance(expected, complex)


@pytest.mark.parametrize(
    "text",
    [
        "f()", "a", "1+1", "1 if 1 else 2", "[x for x in [1]]", "lambda: 1", "...", "[...]", "f'{1}'", "*[1]", "{**{}}",
        "1;2", "1\n2", "", "x=1", "set([1])", "set(1)", "set(set)", "frozenset(1)", "frozenset('ab')", "frozenset({1}, {2})",
        "float('1')", "float(1)", "float('nan', 1)", "float(x='nan')", "-True", "+'a'", "--1", "not 1", "~1", "1j+2j",
        "1+2", "1-True", "nan()", "Nan", "inf.real", "{[]}", "{[]: 1}", "{{}}", "1 < 2", "(yield)", "10**3", "[1](0)",
        "__import__('os')", "1" * 5000, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "x" * (MAX_TEXT + 1), "-1+-2j",
    ],
)  # fmt: skip
def test_not_literals(text):
    with pytest.raises(ValueError):
        parse_value(text)


def test_arguments():
    assert parse_arguments("1, [2], key='x'") == ((1, [2]), {"key": "x"})
    assert parse_arguments("") == ((), {})
    assert parse_arguments("1,\n 2,") == ((1, 2), {})
    assert parse_arguments("(1, 2)") == (((1, 2),), {})
    assert parse_arguments("-1, {'a': {1}}, nan")[0][:2] == (-1, {"a": {1}})
    assert parse_arguments("'), (' # ),") == (("), (",), {})
    for text in (
        "1)+f(2",
        "1)(2",
        "*[1]",
        "**{}",
        "a=1, a=2",
        "1)",
        "f(1)",
        "x",
        "1, 2 for x in y",
        "1); f(2",
        "a=1, 2",
    ):
        with pytest.raises(ValueError):
            parse_arguments(text)


@given(st.lists(VALUES, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "key"]), VALUES, max_size=2))
def test_arguments_round_trip(args, kwargs):
    again = parse_arguments(canonical_arguments((tuple(args), kwargs)))
    assert equal(list(again[0]), args)
    assert equal(again[1], kwargs)


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [Liar(1), [Liar(1)], {Liar(1): 2}, {1: Liar(2)}, {Liar(1)}, object(), range(2), ..., bytearray()]
)
def test_only_exact_plain_types(value):
    with pytest.raises(Unsupported):
        encode(value, 1000)
    with pytest.raises(ValueError):
        canonical(value)
    assert not equal(value, value)
    assert not equal(1, value)


def test_encode_is_capped():
    cycle: list = []
    cycle.append(cycle)
    wide = "x"
    for _ in range(60):
        wide = [wide, wide]  # type: ignore[assignment]
    for value in (cycle, wide, "x" * 101, [0] * 10**6, 10**5000, {1: cycle}, b"\0" * 99):
        with pytest.raises(TooLarge):
            encode(value, 100)
    assert encode("x" * 98, 100) == repr("x" * 98)


def test_depth_limits_agree():
    deep: list = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert equal(parse_value(encode(deep, 1000)), deep)
    with pytest.raises(TooLarge):
        encode([deep], 1000)
    with pytest.raises(ValueError):
        canonical([deep])


def test_text_survives_json():
    texts = ["\ud800", "\0", "\u2028", "é", "'\"\\"]
    for text in texts:
        assert json.loads(json.dumps(canonical(text))) == canonical(text)
        canonical(text).encode()  # printable or escaped: never a lone surrogate


def test_keys_order_nothing_by_chance():
    keys = [comparison_key(set(map(str, range(n)))) for n in range(1, 30)]
    assert all(a != b for a, b in pairwise(keys))
