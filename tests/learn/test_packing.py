"""Packing: every trajectory is found again, once, whole; shapes never change; little is wasted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.learn.packing import Trajectory, first_fit_decreasing, micro_bound, pack

ROW = 24
SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=30)


def trajectory(index: int, prompt: int, response: int) -> Trajectory:
    """Token ids that say whose they are: 100 * index + position, never 0."""
    ids = np.arange(1, prompt + response + 1, dtype=np.int32) + 100 * index
    logprobs = -(np.arange(response, dtype=np.float32) + index + 1)
    return Trajectory(ids[:prompt], ids[prompt:], logprobs, 0.0, index % 6)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 4))
def test_round_trip(sizes: list[tuple[int, int]], rows: int) -> None:
    trajectories = [trajectory(i, p, r) for i, (p, r) in enumerate(sizes)]
    advantages = np.linspace(-1, 1, len(sizes)).astype(np.float32)
    bound = micro_bound(len(sizes), ROW, ROW, rows)
    batch = pack(trajectories, advantages, ROW, rows, bound + 1)
    assert batch.tokens.shape == (bound + 1, rows, ROW)
    assert batch.n_micro <= bound
    assert not batch.segments[batch.n_micro :].any()
    found = set()
    for m, r in np.ndindex(batch.tokens.shape[:2]):
        segments = batch.segments[m, r]
        assert (segments[np.argmin(segments) :] == 0).all() or segments.all()  # padding only at the end
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            tokens = batch.tokens[m, r][here]
            index = int(tokens[0]) // 100
            want = trajectories[index]
            found.add(index)
            np.testing.assert_array_equal(tokens, np.concatenate([want.prompt, want.response]))
            np.testing.assert_array_equal(batch.positions[m, r][here], np.arange(len(want)))
            prompt, zeros = len(want.prompt), np.zeros(len(want.prompt), np.float32)
            response = np.ones(len(want.response), np.float32)
            np.testing.assert_array_equal(batch.loss_mask[m, r][here], np.concatenate([zeros, response]))
            np.testing.assert_array_equal(batch.old_logprobs[m, r][here], np.concatenate([zeros, want.logprobs]))
            expected = np.concatenate([zeros, response * advantages[index]])
            np.testing.assert_array_equal(batch.advantages[m, r][here], expected)
            assert (batch.group[m, r][here][prompt:] == want.group).all()
            assert (batch.group[m, r][here][:prompt] == -1).all()
    assert found == set(range(len(sizes)))
    assert batch.loss_mask.sum() == sum(r for _, r in sizes)
    assert (batch.segments > 0).sum() == sum(p + r for p, r in sizes)


def test_first_fit_decreasing_by_hand() -> None:
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), max_size=60), st.integers(9, 40))
def test_bound_on_micro_batches_holds(lengths: list[int], capacity: int) -> None:
    assert len(first_fit_decreasing(lengths, capacity)) <= micro_bound(len(lengths), 9, capacity, 1)


def test_little_padding_on_heavy_tailed_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, size=384), 16, 2048).astype(int)
    batch = pack([trajectory(i, 8, n - 8) for i, n in enumerate(lengths)], np.zeros(384), 2048, 1, 384)
    assert batch.padding_share < 0.1


def test_empty_batch() -> None:
    batch = pack([], [], ROW, 2, 3)
    assert batch.n_micro == 0 and batch.tokens.shape == (3, 2, ROW) and batch.padding_share == 0.0


@pytest.mark.parametrize(
    ("trajectories", "max_micro", "words"),
    [
        ([trajectory(0, 12, 13)], 1, "25 tokens, a row holds 24"),
        ([trajectory(0, 0, 3)], 1, "at least one prompt token"),
        ([trajectory(0, 3, 0)], 1, "one response token"),
        ([trajectory(0, 12, 12), trajectory(1, 12, 12)], 1, "max_micro is 1"),
        ([Trajectory(np.ones(2, np.int32), np.ones(2, np.int32), np.zeros(3, np.float32), 0.0, 0)], 1, "3 log-probs"),
    ],
)
def test_nonsense_is_refused(trajectories: list[Trajectory], max_micro: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(trajectories, [0.0] * len(trajectories), ROW, 1, max_micro)
