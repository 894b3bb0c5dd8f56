"""Micro Python: one-variable programs of a few statements over ints, lists of ints and strings.

The generator knows, for every statement, how to run it forwards and how to find one simple preimage, so it can write
down the value before each statement (the scratchpad) in both directions. It serves pretraining and the held-out
evaluation only; self-play never sees it, there the policy itself writes the programs and real Python runs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from azr_jax.tasks.canonical import canonical_program

LETTERS = "abcde"
#: One program in HELD_OUT_SHARE is never shown in pretraining; evaluation draws from exactly those.
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Step:
    """One statement `x = expr`: its text, its effect, and one preimage of a value (may raise or be wrong: check)."""

    expr: str
    apply: Callable[[Any], Any]
    invert: Callable[[Any], Any]
    result: type  # int, list or str


@dataclass(frozen=True)
class Limits:
    """Bounds on the values of a program, so that they stay within a tiny model's reach."""

    magnitude: int = 99
    list_length: int = 6
    string_length: int = 8
    input_int: int = 20
    input_digit: int = 9
    input_length: int = 4


NORMAL = Limits()
#: The out-of-distribution split "bigger values".
BIGGER = Limits(magnitude=999, list_length=9, string_length=12, input_int=60, input_digit=20, input_length=6)


def _int_steps(r: Random) -> list[Step]:
    k, m, d, j = r.randint(1, 9), r.randint(2, 4), r.randint(2, 3), r.randint(2, 5)
    limit, up, down = r.randint(2, 9), r.randint(1, 9), r.randint(1, 9)
    return [
        Step(f"x + {k}", lambda x: x + k, lambda y: y - k, int),
        Step(f"x - {k}", lambda x: x - k, lambda y: y + k, int),
        Step(f"{k} - x", lambda x: k - x, lambda y: k - y, int),
        Step(f"x * {m}", lambda x: x * m, lambda y: y // m, int),
        Step(f"x // {d}", lambda x: x // d, lambda y: y * d, int),
        Step(f"x % {j}", lambda x: x % j, lambda y: y, int),
        Step("abs(x)", abs, lambda y: y, int),
        Step(f"[x, {k}]", lambda x: [x, k], lambda y: y[0], list),
        Step("str(x)", str, int, str),
        Step(
            f"x + {up} if x > {limit} else x - {down}",
            lambda x: x + up if x > limit else x - down,
            lambda y: y - up if y - up > limit else y + down,
            int,
        ),
    ]


def _list_steps(r: Random) -> list[Step]:
    k, t, c = r.randint(1, 9), r.randint(1, 5), r.randint(0, 9)
    return [
        Step("x[::-1]", lambda x: x[::-1], lambda y: y[::-1], list),
        Step("sorted(x)", sorted, lambda y: y, list),
        Step(f"x + [{k}]", lambda x: x + [k], lambda y: y[:-1], list),
        Step(f"[{k}] + x", lambda x: [k] + x, lambda y: y[1:], list),
        Step("x[1:]", lambda x: x[1:], lambda y: [0] + y, list),
        Step("x[:-1]", lambda x: x[:-1], lambda y: y + [0], list),
        Step("x * 2", lambda x: x * 2, lambda y: y[: len(y) // 2], list),
        Step(f"[v + {k} for v in x]", lambda x: [v + k for v in x], lambda y: [v - k for v in y], list),
        Step("[v * 2 for v in x]", lambda x: [v * 2 for v in x], lambda y: [v // 2 for v in y], list),
        Step(f"[v for v in x if v > {t}]", lambda x: [v for v in x if v > t], lambda y: y, list),
        Step("sum(x)", sum, lambda y: [y], int),
        Step("max(x)", max, lambda y: [y], int),
        Step("min(x)", min, lambda y: [y], int),
        Step("len(x)", len, lambda y: [0] * y, int),
        Step("x[0]", lambda x: x[0], lambda y: [y], int),
        Step("x[-1]", lambda x: x[-1], lambda y: [y], int),
        Step(f"x.count({c})", lambda x: x.count(c), lambda y: [c] * y, int),
    ]


def _str_steps(r: Random) -> list[Step]:
    a, b = r.sample(LETTERS, 2)
    return [
        Step("x[::-1]", lambda x: x[::-1], lambda y: y[::-1], str),
        Step("''.join(sorted(x))", lambda x: "".join(sorted(x)), lambda y: y, str),
        Step(f"x + '{a}'", lambda x: x + a, lambda y: y[:-1], str),
        Step(f"'{a}' + x", lambda x: a + x, lambda y: y[1:], str),
        Step("x[1:]", lambda x: x[1:], lambda y: "a" + y, str),
        Step("x[:-1]", lambda x: x[:-1], lambda y: y + "a", str),
        Step("x * 2", lambda x: x * 2, lambda y: y[: len(y) // 2], str),
        Step("x.upper()", str.upper, str.lower, str),
        Step(f"x.replace('{a}', '{b}')", lambda x: x.replace(a, b), lambda y: y, str),
        Step("len(x)", len, lambda y: "a" * y, int),
        Step(f"x.count('{a}')", lambda x: x.count(a), lambda y: a * y, int),
        Step(f"x.find('{a}')", lambda x: x.find(a), lambda y: b * y + a if y >= 0 else b, int),
    ]


_STEPS: dict[type, Callable[[Random], list[Step]]] = {int: _int_steps, list: _list_steps, str: _str_steps}


def fits(value: Any, limits: Limits) -> bool:
    """Whether a value is within the limits."""
    if isinstance(value, int):
        return abs(value) <= limits.magnitude
    if isinstance(value, str):
        return len(value) <= limits.string_length
    return len(value) <= limits.list_length and all(abs(v) <= limits.magnitude for v in value)


def sample_input(kind: type, rng: Random, limits: Limits = NORMAL) -> Any:
    """A random input of type int, list or str."""
    if kind is int:
        return rng.randint(0, limits.input_int)
    length = rng.randint(1, limits.input_length)
    if kind is str:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    return [rng.randint(0, limits.input_digit) for _ in range(length)]


@dataclass(frozen=True)
class Program:
    """A sampled program: its statements and the type of its argument."""

    steps: tuple[Step, ...]
    argument: type

    @property
    def source(self) -> str:
        """Python text: assignments, then one return."""
        lines = [f"    x = {step.expr}" for step in self.steps[:-1]]
        return "\n".join(["def f(x):", *lines, f"    return {self.steps[-1].expr}"])

    def states(self, value: Any, limits: Limits = NORMAL) -> list[Any] | None:
        """[input, value after each statement ..., output], or None if a statement fails or leaves the limits."""
        states = [value]
        for step in self.steps:
            try:
                value = step.apply(value)
            except (IndexError, ValueError, TypeError):
                return None
            if not fits(value, limits):
                return None
            states.append(value)
        return states

    def preimages(self, output: Any, limits: Limits = NORMAL) -> list[Any] | None:
        """[output, value before the last statement, ..., an input], or None where the simple inverse fails."""
        states = [output]
        for step in reversed(self.steps):
            try:
                before = step.invert(states[-1])
                if not fits(before, limits) or step.apply(before) != states[-1]:
                    return None
            except (IndexError, ValueError, TypeError):
                return None
            states.append(before)
        return states


def sample_program(length: int, rng: Random) -> Program:
    """A random program of `length` statements; it may still fail on some inputs."""
    kind: type = rng.choice((int, list, list, str))
    argument = kind
    steps = []
    for _ in range(length):
        step = rng.choice(_STEPS[kind](rng))
        steps.append(step)
        kind = step.result
    return Program(tuple(steps), argument)


@lru_cache(maxsize=100_000)
def is_held_out(source: str) -> bool:
    """Whether a program belongs to the class kept for evaluation, by the hash of its canonical AST.

    Insensitive to renaming, so that the rule also covers programs a policy writes in other words.
    """
    digest = hashlib.blake2b(canonical_program(source).encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def sample_runnable(
    lengths: dict[int, float], rng: Random, held_out: bool, limits: Limits = NORMAL
) -> tuple[Program, Any, list[Any]]:
    """A program of the asked class with an input it runs on: (program, input, states)."""
    sizes, weights = zip(*lengths.items(), strict=True)
    while True:
        program = sample_program(rng.choices(sizes, weights)[0], rng)
        value = sample_input(program.argument, rng, limits)
        states = program.states(value, limits)
        if states is not None and is_held_out(program.source) == held_out:
            return program, value, states
