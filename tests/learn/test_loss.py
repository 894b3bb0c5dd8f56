"""The clipped objective: by hand, by finite differences on a 5-token vocabulary, and what masks and clips remove."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.config import LearnConfig
from azr_jax.learn.loss import Totals, gap_quantile, kl_estimate, policy_loss

CONFIG = LearnConfig(clip_low=0.2, clip_high=0.3, entropy_coef=0.05)
T = 6


def batch(seed: int = 0, spread: float = 0.3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.array([[0, 1, 1, 0, 1, 1]], np.float32)
    old = rng.normal(-1.5, 0.5, (1, T)).astype(np.float32)
    return {
        "logprobs": old + rng.normal(0, spread, (1, T)).astype(np.float32),
        "entropy": rng.uniform(0.5, 1.5, (1, T)).astype(np.float32),
        "old_logprobs": old,
        "advantages": rng.normal(size=(1, T)).astype(np.float32),
        "mask": mask,
        "weights": mask,
        "group": np.where(mask > 0, [[-1, 0, 0, -1, 4, 5]], -1).astype(np.int32),
    }


@jax.jit
def loss(**arrays) -> tuple[jax.Array, Totals]:
    return policy_loss(**arrays, config=CONFIG)


def test_golden_three_tokens() -> None:
    # ratios 1.5, 1.5, 0.5; advantages 2, -1, -2; bounds 0.8 and 1.3:
    # -min(3.0, 2.6) = -2.6; -min(-1.5, -1.3) = 1.5; -min(-1.0, -1.6) = 1.6; entropies 1 + 2 + 3, coefficient 0.05
    value, totals = loss(
        logprobs=np.log([[1.5, 1.5, 0.5]]).astype(np.float32),
        entropy=np.array([[1.0, 2.0, 3.0]], np.float32),
        old_logprobs=np.zeros((1, 3), np.float32),
        advantages=np.array([[2.0, -1.0, -2.0]], np.float32),
        mask=np.ones((1, 3), np.float32),
        weights=np.ones((1, 3), np.float32),
        group=np.array([[0, 0, 3]], np.int32),
    )
    assert float(value) == pytest.approx(-2.6 + 1.5 + 1.6 - 0.05 * 6.0, abs=1e-5)
    assert float(totals.surrogate) == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(totals.tokens, [2, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(totals.entropy, [3, 0, 0, 3, 0, 0], rtol=1e-6)
    assert (float(totals.clipped_low), float(totals.clipped_high)) == (1.0, 1.0)
    assert float(totals.ratio) == pytest.approx(3.5, abs=1e-5)
    assert float(totals.ratio_max) == pytest.approx(1.5, abs=1e-5)
    assert float(totals.gap_max) == pytest.approx(np.log(2.0), abs=1e-5)
    assert float(totals.k3) == pytest.approx(2 * (0.5 - np.log(1.5)) + (-0.5 + np.log(2.0)), abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 1.7, -1.7),  # strictly on-policy: the REINFORCE gradient -A
        (1.31, 1.0, 0.0),  # above the band, good token: no more reward for going further
        (1.31, -1.0, 1.31),  # above the band, bad token: still pushed back
        (0.79, -1.0, 0.0),
        (0.79, 1.0, -0.79),
        (1.25, 1.0, -1.25),  # clip_high is 0.3, not 0.2
    ],
)
def test_gradient_is_zero_exactly_outside_the_band(ratio: float, advantage: float, gradient: float) -> None:
    assert float(one_token(ratio, advantage, CONFIG)[1]) == pytest.approx(gradient, abs=1e-5)


def test_finite_differences_on_five_tokens() -> None:
    rng = np.random.default_rng(1)
    arrays = batch()
    targets = rng.integers(0, 5, T)
    logits = rng.normal(size=(T, 5))
    arrays["old_logprobs"] = rng.normal(-1.6, 0.4, (1, T)).astype(np.float32)

    def ours(x):
        logp = jax.nn.log_softmax(x)
        arrays["logprobs"] = logp[jnp.arange(T), targets][None]
        arrays["entropy"] = -jnp.sum(jnp.exp(logp) * logp, axis=-1)[None]
        return loss(**arrays)[0]

    def exact(x):
        p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        ratio = p[np.arange(T), targets] / np.exp(arrays["old_logprobs"][0].astype(np.float64))
        a = arrays["advantages"][0].astype(np.float64)
        entropy = -(p * np.log(p)).sum(axis=1)
        return (arrays["mask"][0] * (-np.minimum(ratio * a, np.clip(ratio, 0.8, 1.3) * a) - 0.05 * entropy)).sum()

    assert float(jax.jit(ours)(logits.astype(np.float32))) == pytest.approx(exact(logits), abs=1e-5)
    want, step = np.zeros_like(logits), 1e-5
    for index in np.ndindex(logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = step
        want[index] = (exact(logits + moved) - exact(logits - moved)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logits.astype(np.float32)), want, atol=2e-5)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "old_logprobs", "advantages"])
def test_masked_positions_count_for_nothing_and_all_others_count(name: str) -> None:
    arrays = batch(spread=0.05)  # inside the clip band, where every log-prob matters
    before = loss(**arrays)
    for position in range(T):
        changed = {key: value.copy() for key, value in arrays.items()}
        changed[name][0, position] += 0.01
        after = loss(**changed)
        if arrays["mask"][0, position]:
            assert float(after[0]) != float(before[0])
        else:
            jax.tree.map(np.testing.assert_array_equal, after, before)


def test_totals_merge_sums_and_maxima() -> None:
    first, second = loss(**batch(0))[1], loss(**batch(1))[1]
    both = loss(**{key: np.concatenate([batch(0)[key], batch(1)[key]]) for key in batch()})[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first.merge(second), both)
    jax.tree.map(np.testing.assert_array_equal, Totals.zero().merge(first), first)


def test_an_absurd_token_does_not_overflow() -> None:
    arrays = batch()
    arrays["old_logprobs"][0, 1] = -1e30
    assert np.isfinite(loss(**arrays)[0])


def one_token(ratio: float, advantage: float, config: LearnConfig, reference: float | None = None) -> jax.Array:
    """Loss and its derivative by the log-probability of a single token: float32 [2]."""
    one = jnp.ones((1, 1))

    def value(logprob: jax.Array) -> jax.Array:
        return policy_loss(
            logprobs=logprob * one,
            entropy=0 * one,
            old_logprobs=0 * one,
            advantages=advantage * one,
            mask=one,
            weights=one,
            group=jnp.zeros((1, 1), jnp.int32),
            config=config,
            reference=None if reference is None else reference * one,
        )[0]

    return jnp.stack(jax.jit(jax.value_and_grad(value))(jnp.log(jnp.float32(ratio))))


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    config = LearnConfig(dual_clip=3.0, entropy_coef=0.0)
    np.testing.assert_allclose(one_token(2.0, -1.0, config), [2.0, 2.0], rtol=1e-5)  # below 3: as without
    np.testing.assert_allclose(one_token(5.0, -1.0, config), [3.0, 0.0], rtol=1e-5)  # at most 3, and no gradient
    np.testing.assert_allclose(one_token(5.0, 1.0, config), [-1.2, 0.0], rtol=1e-5)  # good tokens: the ordinary clip


def test_truncated_importance_sampling() -> None:
    config = LearnConfig(importance_cap=2.0, entropy_coef=0.0)
    np.testing.assert_allclose(one_token(1.5, 1.0, config), [-1.5, -1.5], rtol=1e-5)  # not clipped at 1.2
    np.testing.assert_allclose(one_token(5.0, -1.0, config), [2.0, 2.0], rtol=1e-5)  # capped, and still a gradient
    arrays = batch(spread=2.0)
    _, totals = jax.jit(lambda **a: policy_loss(**a, config=config))(**arrays)
    mask = arrays["mask"] > 0
    ratio = np.exp(arrays["logprobs"] - arrays["old_logprobs"])[mask]
    assert float(totals.truncated) == (ratio > 2.0).sum() > 0
    assert float(totals.ratio_squared) == pytest.approx((ratio**2).sum(), rel=1e-5)
    assert float(totals.clipped_low) == float(totals.clipped_high) == 0.0, "nothing is clipped then"


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("k1", np.log(2.0), 1.0),
        ("k2", np.log(2.0) ** 2 / 2, np.log(2.0)),
        ("k3", 0.5 - 1 + np.log(2.0), 1 - 0.5),
    ],
)
def test_kl_estimators_by_hand(kind: str, value: float, slope: float) -> None:
    config = LearnConfig(kl=kind, kl_coef=0.1, entropy_coef=0.0)  # type: ignore[arg-type]
    got = one_token(1.0, 0.0, config, reference=-np.log(2.0))
    np.testing.assert_allclose(got, [0.1 * value, 0.1 * slope], rtol=1e-5)


def test_kl_estimators_on_five_tokens() -> None:
    """Weighted by the policy, all three sum to the divergence; their gradients are the ones the docstring names."""
    rng = np.random.default_rng(3)
    logits, other = jnp.asarray(rng.normal(size=5)), jax.nn.log_softmax(jnp.asarray(rng.normal(size=5)))

    def forward(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - other))

    def backward(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(other) * (other - jax.nn.log_softmax(x)))

    def estimated(x: jax.Array, kind: str) -> jax.Array:
        sampled = jax.lax.stop_gradient(jax.nn.softmax(x))  # how often each token is drawn
        return jnp.sum(sampled * kl_estimate(jax.nn.log_softmax(x) - other, kind))

    for kind in ("k1", "k3"):
        np.testing.assert_allclose(estimated(logits, kind), forward(logits), rtol=1e-5)
    for kind, gradient in (("k1", 0 * logits), ("k2", jax.grad(forward)(logits)), ("k3", jax.grad(backward)(logits))):
        np.testing.assert_allclose(jax.grad(estimated)(logits, kind), gradient, atol=1e-6)


def test_weights_scale_each_token() -> None:
    arrays = batch()
    arrays["weights"] = arrays["mask"] * np.array([[9, 2, 0.5, 9, 1, 0]], np.float32)
    parts = []
    for position in range(T):
        alone = {**arrays, "weights": np.where(np.arange(T) == position, arrays["mask"], 0)}
        parts.append(float(loss(**alone)[0]))
    assert float(loss(**arrays)[0]) == pytest.approx(float((arrays["weights"][0] * parts).sum()), abs=1e-5)


def test_the_quantile_of_the_gap_is_at_most_a_level_above_the_true_one() -> None:
    rng = np.random.default_rng(0)
    gaps = 10 ** rng.uniform(-7, 0, 4000)
    mask = rng.random(4000) < 0.7
    shape = (40, 100)
    old = np.zeros(shape, np.float32)
    new = (gaps * rng.choice([-1, 1], 4000)).astype(np.float32).reshape(shape)
    ones, group = np.ones(shape, np.float32), np.zeros(shape, np.int32)
    arrays = (new, old, old, ones, mask.reshape(shape).astype(np.float32), ones, group)
    halves = [
        policy_loss(*(jnp.asarray(x[part]) for x in arrays), LearnConfig())[1] for part in np.split(np.arange(40), 2)
    ]
    totals = halves[0].merge(halves[1])
    assert float(totals.gap_levels.sum()) == mask.sum()
    for share in (0.5, 0.99):
        true = np.quantile(gaps[mask], share)
        assert true <= float(gap_quantile(totals.gap_levels, share)) <= true * 10**0.26
    far = totals._replace(gap_levels=jnp.zeros(38).at[-1].set(5.0))
    assert np.isinf(gap_quantile(far.gap_levels, 0.99)) and float(gap_quantile(Totals.zero().gap_levels, 0.99)) < 1e-7
