"""What a step's trajectories become: overlong ones, baselines, and how much a token counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_jax.config import Config, LearnConfig, RolloutConfig, TasksConfig
from azr_jax.learn.advantage import EPS, global_baseline, sample_relative, task_relative
from azr_jax.learn.packing import Trajectory
from azr_jax.learn.prepare import most_trajectories, overlong, prepare, token_weights

CONFIG = Config(
    rollout=RolloutConfig(max_prompt=4, max_response=10),
    tasks=TasksConfig(batch=4, samples=4),
    learn=LearnConfig(rows=2, reuse_estimates=True),
)
KINDS_OF_MEAN = ["token-mean", "sequence-mean", "constant", "group-mean"]


def trajectory(length: int, reward: float, group: int, task: int = -1, truncated: bool = False) -> Trajectory:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Trajectory(ids[:1], ids, -np.ones(length, np.float32), reward, group, task, truncated)


def learning(**keys) -> Config:
    return replace(CONFIG, learn=replace(CONFIG.learn, **keys))


BATCH = [
    trajectory(2, 1.0, 0),
    trajectory(4, 0.0, 0),
    trajectory(10, -1.0, 3, task=0, truncated=True),
    trajectory(5, 1.0, 3, task=0),
    trajectory(9, 0.0, 3, task=1),
]


def mean_loss(losses: list[np.ndarray], config: Config) -> float:
    """The loss that weights and denominator make of given token losses."""
    weights, denominator = token_weights(BATCH, config)
    return sum(w * x.sum() for w, x in zip(weights, losses, strict=True)) / denominator


def test_every_aggregation_is_the_mean_it_is_named_after() -> None:
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=len(t.response)) for t in BATCH]
    tokens = np.concatenate(losses)
    means = np.array([x.mean() for x in losses])
    by_group = [np.concatenate(losses[:2]).mean(), np.concatenate(losses[2:]).mean()]
    want = {
        "token-mean": tokens.mean(),
        "sequence-mean": means.mean(),
        "constant": np.mean([x.sum() / 10 for x in losses]),
        "group-mean": np.mean(by_group),
    }
    for kind, value in want.items():
        assert mean_loss(losses, learning(aggregation=kind)) == pytest.approx(value, rel=1e-5)
    assert len({round(value, 9) for value in want.values()}) == 4, "four different means"


def test_the_packed_batch_carries_weights_and_denominator() -> None:
    for kind in KINDS_OF_MEAN:
        config = learning(aggregation=kind)
        batch, _ = prepare(BATCH, config, 2)
        weights, denominator = token_weights(BATCH, config)
        assert batch.denominator == denominator
        total = sum(w * len(t.response) for w, t in zip(weights, BATCH, strict=True))
        assert batch.weights.sum() == pytest.approx(total)
        assert ((batch.weights > 0) == (batch.loss_mask > 0)).all()


def test_the_shape_holds_the_largest_step() -> None:
    assert most_trajectories(CONFIG) == 4 * (6 + 3 * 4)
    many = [trajectory(10, 0.0, i % 6) for i in range(most_trajectories(CONFIG))]
    assert prepare(many, CONFIG, 2)[0].tokens.shape == prepare(BATCH, CONFIG, 2)[0].tokens.shape


def test_overlong_responses() -> None:
    assert overlong(BATCH, learning(overlong="score")) == BATCH
    assert overlong(BATCH, learning(overlong="mask")) == [t for t in BATCH if not t.truncated]
    # the penalty rises from 0 at 8 tokens to 1 at 10
    rewards = [t.reward for t in overlong(BATCH, learning(overlong="penalty"))]
    assert rewards == pytest.approx([1.0, 0.0, -2.0, 1.0, -0.5])
    batch, _ = prepare([BATCH[2]], learning(overlong="mask"), 2)
    assert batch.n_micro == 0 and batch.denominator == 0


def test_masked_rows_leave_the_denominator_and_the_baseline() -> None:
    batch, stats = prepare(BATCH, learning(overlong="mask"), 2)
    assert batch.denominator == 20 and stats["solve_deduction/mean"] == pytest.approx(0.5)


def test_one_baseline_for_all() -> None:
    # rewards 1 0 -1 1 0: mean 1/5, variance (.64 + .04 + 1.44 + .64 + .04) / 4 = .7
    got = global_baseline([t.reward for t in BATCH], [len(t.response) for t in BATCH])
    np.testing.assert_allclose(got, np.array([0.8, -0.2, -1.2, 0.8, -0.2]) / np.sqrt(0.7 + EPS), rtol=1e-6)
    assert (global_baseline([0.1] * 7, [1] * 7) == 0.0).all()


def test_baselines_of_a_task() -> None:
    rewards, samples = [1.0, 0.0, 0.0, 1.0, 0.5], [7, 7, 7, -1, 9]
    fallback = [0.0, 0.0, 0.0, 0.25, 0.0]
    # GRPO: mean 1/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3. RLOO: 1 - 0, 0 - 1/2, 0 - 1/2.
    grpo = sample_relative(rewards, samples, fallback, leave_one_out=False)
    np.testing.assert_allclose(grpo, [2 / 3 / 3**-0.5, -(3**0.5) / 3, -(3**0.5) / 3, 0.25, 0.0], atol=1e-6)
    rloo = sample_relative(rewards, samples, fallback, leave_one_out=True)
    np.testing.assert_allclose(rloo, [1.0, -0.5, -0.5, 0.25, 0.0], atol=1e-6)


def test_proposals_keep_their_baseline_under_grpo() -> None:
    batch, _ = prepare(BATCH, learning(advantage="grpo"), 2)
    want = task_relative([1.0, 0.0], [0, 0], [2, 4])[0]
    assert set(np.unique(batch.advantages[batch.group == 0])) == set(want)


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(-1, 3)), min_size=1, max_size=30), st.booleans())
def test_advantages_of_a_task_sum_to_nothing(batch: list[tuple[float, int]], leave_one_out: bool) -> None:
    rewards, samples = zip(*batch, strict=True)
    got = sample_relative(rewards, samples, np.zeros(len(batch)), leave_one_out)
    for task in set(samples) - {-1}:
        assert abs(got[np.array(samples) == task].sum()) < 1e-3
