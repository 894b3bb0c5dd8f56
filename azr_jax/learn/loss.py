"""The clipped policy-gradient loss of one micro-batch, as sums.

Nothing here divides: the loss is a numerator, token counts are kept beside it, and the update step divides once by the
tokens of the whole global batch. So the token mean (paper: "token-mean" aggregation) is the same for every micro-batch
size, packing and mesh; a mean of means would not be. There is no KL term and no value function (paper table 3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from azr_jax.config import LearnConfig
from azr_jax.models.transformer import Array
from azr_jax.tasks.kinds import GROUPS

#: Bound on |log ratio| before exponentiation: one absurd token cannot overflow (verl/trainer/ppo/core_algos.py).
MAX_LOG_RATIO = 20.0


class Totals(NamedTuple):
    """What a micro-batch adds to the statistics of the batch: all float32 scalars unless a shape is given.

    Sums over trained tokens: surrogate (the clipped objective, negated), entropy [6] and tokens [6] by group, ratio,
    clipped_low and clipped_high (counts of tokens whose gradient the clip removed), gap (|logp - old|), k3 (the k3
    estimate of KL(old || new)). Maxima: ratio_max, gap_max.
    """

    surrogate: Array
    entropy: Array
    tokens: Array
    ratio: Array
    clipped_low: Array
    clipped_high: Array
    gap: Array
    k3: Array
    ratio_max: Array
    gap_max: Array

    @classmethod
    def zero(cls) -> Totals:
        """The neutral element of `+`."""
        scalar, groups = jnp.zeros((), jnp.float32), jnp.zeros((len(GROUPS),), jnp.float32)
        return cls(scalar, groups, groups, *[scalar] * 7)

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
    group: Array,
    config: LearnConfig,
) -> tuple[Array, Totals]:
    """(numerator of the loss, Totals) of one micro-batch; every argument is [B, T] (group int32, the rest float32).

    numerator = sum over masked tokens of -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) - c * entropy
    with ratio = exp(logp - old) (PPO; paper section 3.3.5) and c the entropy coefficient.
    The loss is this summed over micro-batches, divided by the sum of the mask.
    """
    difference = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    log_ratio = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate = -jnp.minimum(ratio * advantages, bounded * advantages)
    entropy = jnp.where(mask > 0, entropy, 0.0)
    numerator = jnp.sum(mask * (surrogate - config.entropy_coef * entropy))

    members = jax.nn.one_hot(group, len(GROUPS), dtype=jnp.float32) * mask[..., None]  # [B, T, 6]
    gap = jnp.abs(difference)
    totals = Totals(
        surrogate=jnp.sum(mask * surrogate),
        entropy=jnp.einsum("btg,bt->g", members, entropy),
        tokens=jnp.sum(members, axis=(0, 1)),
        ratio=jnp.sum(mask * ratio),
        clipped_low=jnp.sum(mask * ((ratio < 1.0 - config.clip_low) & (advantages < 0))),
        clipped_high=jnp.sum(mask * ((ratio > 1.0 + config.clip_high) & (advantages > 0))),
        gap=jnp.sum(mask * gap),
        k3=jnp.sum(mask * (ratio - 1.0 - log_ratio)),
        ratio_max=jnp.max(jnp.where(mask > 0, ratio, 0.0)),
        gap_max=jnp.max(mask * gap),
    )
    return numerator, jax.lax.stop_gradient(totals)
