"""Intervals against textbook numbers and coverage by simulation."""

from __future__ import annotations

from random import Random

import pytest

from azr_jax.evals.intervals import paired_difference, share


def test_wilson_interval_matches_published_values() -> None:
    """Newcombe 1998, table I: 81/263 and 0/20 (method 3, Wilson score without continuity correction)."""
    estimate = share([True] * 81 + [False] * 182)
    assert estimate.value == pytest.approx(0.3080, abs=1e-4)
    assert (estimate.low, estimate.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = share([False] * 20)
    assert (none.low, none.high) == (0.0, pytest.approx(0.1611, abs=1e-4))


def test_paired_difference_by_hand() -> None:
    """Four items gained, one lost, five unchanged: mean 0.3, variance (5 - 10 * 0.09) / 9."""
    before = [False] * 4 + [True] + [True, False, True, False, True]
    after = [True] * 4 + [False] + [True, False, True, False, True]
    estimate = paired_difference(before, after)
    half = 1.959964 * ((5 - 10 * 0.09) / 9 / 10) ** 0.5
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - half) and estimate.high == pytest.approx(0.3 + half)


def test_pairing_narrows_the_interval_of_correlated_outcomes() -> None:
    rng = Random(0)
    before = [rng.random() < 0.5 for _ in range(1000)]
    after = [value or rng.random() < 0.1 for value in before]
    paired = paired_difference(before, after)
    shuffled = list(after)
    rng.shuffle(shuffled)
    assert (paired.high - paired.low) < 0.6 * (lambda e: e.high - e.low)(paired_difference(before, shuffled))


def test_coverage_is_about_95_percent() -> None:
    rng, inside = Random(1), 0
    for _ in range(400):
        before = [rng.random() < 0.4 for _ in range(300)]
        after = [(rng.random() < 0.3) if not value else (rng.random() < 0.9) for value in before]
        true = 0.6 * 0.3 + 0.4 * 0.9 - 0.4
        estimate = paired_difference(before, after)
        inside += estimate.low <= true <= estimate.high
    assert 0.92 <= inside / 400 <= 0.98


def test_different_lengths_are_refused_and_empty_lists_know_nothing() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([True] * 3, [True] * 2)
    assert share([]).high == 1.0 and paired_difference([], []).high == 1.0
