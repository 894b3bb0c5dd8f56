"""Rewards: the cases of Eq. 4-6 in every preset, and the closed form of the expected proposer reward."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.config import PRESETS
from azr_jax.tasks.rewards import (
    Outcome,
    expected_proposer_reward,
    learnability,
    proposer_reward,
    share_inside,
    solver_reward,
)


@pytest.mark.parametrize(("preset", "at_extremes"), [("paper", 0.0), ("fixed", 0.0), ("reference", -0.5)])
def test_learnability_of_the_presets(preset: str, at_extremes: float) -> None:
    rules = PRESETS[preset]
    rates = [k / 8 for k in range(9)]
    assert [learnability(rate, rules) for rate in rates] == [
        at_extremes, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, at_extremes,
    ]  # fmt: skip
    assert proposer_reward(Outcome.VALID, 0.25, rules) == 0.75
    assert proposer_reward(Outcome.DUPLICATE, None, rules) == at_extremes
    assert proposer_reward(Outcome.DUPLICATE, 0.5, rules) == at_extremes
    assert proposer_reward(Outcome.INVALID, None, rules) == -1.0
    assert proposer_reward(Outcome.BAD_FORMAT, None, rules) == -1.0


def test_impossible_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="needs its solve rate"):
        proposer_reward(Outcome.VALID, None, PRESETS["fixed"])
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            learnability(rate, PRESETS["fixed"])


def test_solver() -> None:
    assert solver_reward("3", True) == 1.0
    assert solver_reward("3", False) == -0.5
    assert solver_reward("", False) == -0.5  # an empty answer is an answer: f() takes an empty argument list
    assert solver_reward(None, False) == -1.0


@given(st.floats(0.0, 1.0), st.integers(1, 40), st.sampled_from([0.0, -0.5, 0.3]))
def test_expected_reward_is_the_binomial_sum(p: float, n: int, extreme: float) -> None:
    brute = sum(comb(n, k) * p**k * (1 - p) ** (n - k) * (1 - k / n if 0 < k < n else extreme) for k in range(n + 1))
    assert expected_proposer_reward(p, n, extreme) == pytest.approx(brute, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "extreme", "optimum"),
    [
        (4, 0.0, 0.37),
        (8, 0.0, 0.26),
        (16, 0.0, 0.17),
        (32, 0.0, 0.11),
        (4, -0.5, 0.42),
        (8, -0.5, 0.30),
        (16, -0.5, 0.19),
    ],
)
def test_more_samples_push_the_proposer_to_harder_tasks(n: int, extreme: float, optimum: float) -> None:
    grid = [i / 1000 for i in range(1001)]
    best = max(grid, key=lambda p: expected_proposer_reward(p, n, extreme))
    assert round(best, 2) == pytest.approx(optimum)


def test_share_inside() -> None:
    assert share_inside([]) == 0.0
    assert share_inside([0.0, 1.0]) == 0.0
    assert share_inside([0.0, 1.0, 0.5, 0.125]) == 0.5
