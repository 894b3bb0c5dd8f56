"""TRR++ against numbers worked out by hand and against the definition spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.learn.advantage import DDOF, EPS, task_relative

REWARD = st.sampled_from([-1.0, -0.5, 0.0, 0.125, 0.5, 1.0])
BATCH = st.lists(st.tuples(REWARD, st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=40)


def test_sequence_golden() -> None:
    # mean 0.125, squared deviations .765625 + .015625 + .015625 + .390625 = 1.1875, variance 1.1875 / 3, std .6291529
    got, stats = task_relative([1.0, 0.0, 0.0, -0.5], [0] * 4, [9, 1, 5, 70], "sequence")
    np.testing.assert_allclose(got, [1.3907591, -0.1986799, -0.1986799, -0.9933993], atol=1e-6)
    assert stats["propose_deduction/mean"] == pytest.approx(0.125)
    assert stats["propose_deduction/std"] == pytest.approx(0.6291529, abs=1e-6)


def test_token_golden() -> None:
    # tokens 1 1 1 0: mean 3/4, variance (3 * 1/16 + 9/16) / 3 = 1/4, std 1/2
    got, stats = task_relative([1.0, 0.0], [5, 5], [3, 1], "token")
    np.testing.assert_allclose(got, [0.5, -1.5], atol=1e-6)
    assert stats["solve_induction/std"] == pytest.approx(0.5)


def test_population_variance_by_name() -> None:
    got, _ = task_relative([1.0, 0.0], [2, 2], [1, 1], "sequence", ddof=0)
    np.testing.assert_allclose(got, [1.0, -1.0], atol=1e-6)


def test_no_spread_is_exactly_zero() -> None:
    # 0.1 seven times: the computed mean is not 0.1 to the last bit, so a variance test would fail here
    rewards, groups = [0.1] * 7 + [1.0] + [0.0, 1.0], [0] * 7 + [3] + [4, 4]
    for whitening in ("sequence", "token"):
        got, stats = task_relative(rewards, groups, list(range(1, 11)), whitening)  # type: ignore[arg-type]
        assert (got[:8] == 0.0).all() and (got[8:] != 0.0).all()
        assert stats["zero_share"] == pytest.approx(0.8)
        assert "propose_abduction/mean" not in stats  # an empty group has no statistics
    empty, stats = task_relative([], [], [])
    assert empty.shape == (0,) and stats == {"zero_share": 0.0}


@settings(deadline=None, max_examples=60)
@given(BATCH, st.sampled_from(["sequence", "token"]))
def test_equals_the_definition_group_by_group(batch: list[tuple[float, int, int]], whitening: str) -> None:
    reward, group, length = (np.array(column) for column in zip(*batch, strict=True))
    got, _ = task_relative(reward, group, length, whitening)  # type: ignore[arg-type]
    for g in set(group.tolist()):
        r = reward[group == g]
        spread = np.repeat(r, length[group == g]) if whitening == "token" else r
        if len(set(r)) == 1:
            assert (got[group == g] == 0).all()
        else:
            want = (r - spread.mean()) / np.sqrt(spread.var(ddof=DDOF) + EPS)
            np.testing.assert_allclose(got[group == g], want, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(BATCH, st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(batch: list[tuple[float, int, int]], random) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)
    columns = [np.array(column) for column in zip(*batch, strict=True)]
    got, _ = task_relative(*columns)
    moved, _ = task_relative(*[column[order] for column in columns])
    np.testing.assert_allclose(moved, got[order], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], [0, 0], [1]), "equal"),
        (([float("nan")], [0], [1]), "finite"),
        (([1.0], [0], [0]), "response tokens"),
        (([1.0], [6], [1]), r"0\.\.5"),
    ],
)
def test_nonsense_is_refused(arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task_relative(*arguments)
