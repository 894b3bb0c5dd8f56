"""The clipped policy-gradient loss of one micro-batch, as sums.

Nothing here divides: the loss is a numerator of weighted token losses, and the update step divides once by the
denominator of the whole global batch (prepare.py). So every way of averaging is the same for every micro-batch size,
packing and mesh; a mean of means would not be. There is no value function (paper table 3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from azr_jax.config import LearnConfig
from azr_jax.models.transformer import Array
from azr_jax.tasks.kinds import GROUPS

#: Upper bounds of the levels in which |logp - old| is counted, four to a factor of ten; a last level is open.
GAP_LEVELS = tuple(10.0 ** (exponent / 4) for exponent in range(-32, 5))

#: Bound on |log ratio| before exponentiation: one absurd token cannot overflow (verl/trainer/ppo/core_algos.py).
MAX_LOG_RATIO = 20.0


class Totals(NamedTuple):
    """What a micro-batch adds to the statistics of the batch: all float32 scalars unless a shape is given.

    Sums over trained tokens: surrogate (the clipped objective, negated), entropy [6] and tokens [6] by group, ratio
    (of learner to sampler) and its square, clipped_low, clipped_high and truncated (counts of tokens whose gradient
    the clip removed, or whose importance weight was capped), gap (|logp - old|), k3 (the k3 estimate of
    KL(old || new)), reference_kl (the penalty, before its coefficient). Maxima: ratio_max, gap_max. Counts [38] of
    tokens by GAP_LEVELS: gap_levels.
    """

    surrogate: Array
    entropy: Array
    tokens: Array
    ratio: Array
    ratio_squared: Array
    clipped_low: Array
    clipped_high: Array
    truncated: Array
    gap: Array
    k3: Array
    reference_kl: Array
    ratio_max: Array
    gap_max: Array
    gap_levels: Array

    @classmethod
    def zero(cls) -> Totals:
        """The neutral element of `+`."""
        sizes = {"entropy": (len(GROUPS),), "tokens": (len(GROUPS),), "gap_levels": (len(GAP_LEVELS) + 1,)}
        return cls(**{name: jnp.zeros(sizes.get(name, ()), jnp.float32) for name in cls._fields})

    def merge(self, other: Totals) -> Totals:
        """Sums add up, maxima are taken."""
        joined = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(getattr(self, name), getattr(other, name))
            for name in self._fields
        }
        return Totals(**joined)


def policy_loss(
    logprobs: Array,
    entropy: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    weights: Array,
    group: Array,
    config: LearnConfig,
    reference: Array | None = None,
) -> tuple[Array, Totals]:
    """(numerator of the loss, Totals) of one micro-batch; every argument is [B, T] (group int32, the rest float32).

    numerator = sum over masked tokens of weight * (surrogate - entropy_coef * entropy + kl_coef * kl), where

    - surrogate = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logp - old) (PPO; paper
      section 3.3.5); with `dual_clip` c it is at most -c * A for A < 0 (arXiv 1912.09729, Eq. 5);
    - with `importance_cap` c the ratio is 1 (its gradient alone counts) and the token weighs min(ratio, c), constant:
      truncated importance sampling, for samplers whose log-probabilities differ from the learner's
      (fengyao.notion.site/off-policy-rl);
    - kl is an estimate of KL(policy || reference) by `kl` (see `kl_estimate`); reference: log-probs of the frozen one.
    """
    difference = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    log_ratio = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    if config.importance_cap > 0:
        importance = jnp.minimum(lax.stop_gradient(ratio), config.importance_cap)
        gradient_only = jnp.exp(jnp.where(mask > 0, logprobs - lax.stop_gradient(logprobs), 0.0))
        surrogate = -importance * gradient_only * advantages
    else:
        bounded = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
        surrogate = -jnp.minimum(ratio * advantages, bounded * advantages)
        if config.dual_clip > 0:
            surrogate = jnp.where(advantages < 0, jnp.minimum(surrogate, -config.dual_clip * advantages), surrogate)
    entropy = jnp.where(mask > 0, entropy, 0.0)
    loss = surrogate - config.entropy_coef * entropy
    kl = jnp.zeros_like(loss)
    if reference is not None:
        kl = kl_estimate(jnp.where(mask > 0, logprobs - reference, 0.0), config.kl)
        loss = loss + config.kl_coef * kl
    numerator = jnp.sum(weights * jnp.where(mask > 0, loss, 0.0))

    members = jax.nn.one_hot(group, len(GROUPS), dtype=jnp.float32) * mask[..., None]  # [B, T, 6]
    clips = mask * (config.importance_cap <= 0)
    gap = jnp.abs(difference)
    totals = Totals(
        surrogate=jnp.sum(mask * surrogate),
        entropy=jnp.einsum("btg,bt->g", members, entropy),
        tokens=jnp.sum(members, axis=(0, 1)),
        ratio=jnp.sum(mask * ratio),
        ratio_squared=jnp.sum(mask * ratio**2),
        clipped_low=jnp.sum(clips * ((ratio < 1.0 - config.clip_low) & (advantages < 0))),
        clipped_high=jnp.sum(clips * ((ratio > 1.0 + config.clip_high) & (advantages > 0))),
        truncated=jnp.sum(mask * (ratio > config.importance_cap)) if config.importance_cap > 0 else jnp.float32(0),
        gap=jnp.sum(mask * gap),
        k3=jnp.sum(mask * (ratio - 1.0 - log_ratio)),
        reference_kl=jnp.sum(mask * kl),
        ratio_max=jnp.max(jnp.where(mask > 0, ratio, 0.0)),
        gap_max=jnp.max(mask * gap),
        gap_levels=jnp.zeros(len(GAP_LEVELS) + 1).at[jnp.searchsorted(jnp.array(GAP_LEVELS), gap)].add(mask),
    )
    return numerator, lax.stop_gradient(totals)


def gap_quantile(levels: Array, share: float) -> Array:
    """Upper bound of the level that holds the `share` quantile of |logp - old|; inf for the open one.

    levels: `Totals.gap_levels`, float32 [38].
    """
    reached = jnp.cumsum(levels) >= share * jnp.sum(levels)
    return jnp.array([*GAP_LEVELS, jnp.inf], jnp.float32)[jnp.argmax(reached)]


def kl_estimate(difference: Array, kind: str) -> Array:
    """Estimates of KL(policy || reference) from log-ratios policy - reference of sampled tokens, any shape.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, joschu.net/blog/kl-approx.html). As a loss on samples of the
    policy, the mean gradient of k2 is that of KL(policy || reference), that of k3 is that of KL(reference || policy),
    and that of k1 is zero: k1 only measures.
    """
    bounded = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {"k1": bounded, "k2": bounded**2 / 2, "k3": jnp.exp(-bounded) - 1.0 + bounded}[kind]
