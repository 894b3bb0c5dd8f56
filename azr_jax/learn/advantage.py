"""Task-relative REINFORCE++ (TRR++): one baseline for each (role, kind) pair.

The reward of a trajectory is whitened within its group, over the *global* batch of the step: every host calls this with
the trajectories of all hosts, so that no shard has statistics of its own. Runs on the host in float64; a batch is a
few hundred numbers. It holds no state: there is no running baseline and no critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from azr_jax.tasks.kinds import GROUPS

#: Added to the variance under the root (verl's `masked_whiten`, verl/utils/torch_functional.py).
EPS = 1e-8
#: Delta degrees of freedom of the variance: Bessel's correction, as in verl's `masked_var(unbiased=True)`.
DDOF = 1


def task_relative(
    rewards: ArrayLike,
    groups: Sequence[int] | ArrayLike,
    lengths: ArrayLike,
    whitening: Literal["sequence", "token"] = "sequence",
    eps: float = EPS,
    ddof: int = DDOF,
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """A = (r - mean) / sqrt(var + eps) with the mean and variance of the trajectory's own group.

    rewards [N] float, groups [N] int (index into `kinds.GROUPS`), lengths [N] int (response tokens).

    `sequence` (paper section 3.3.5, Eq. 8): every trajectory weighs 1. `token` (the released code, which whitens the
    reward broadcast over response tokens with verl's `masked_whiten`): a trajectory weighs as many times as it has
    response tokens, and ddof counts tokens. A group that is empty, has one trajectory, or whose rewards are all equal
    carries no information: its advantages are exactly 0, never 0 / eps.

    Returns the advantages [N] float32 and statistics: `<role>_<kind>/mean` and `<role>_<kind>/std`, the rewards
    of the groups that are present, and `zero_share`, the share of trajectories whose group has no spread.
    ValueError: lengths of the arguments differ, a reward is not finite, a length is below 1, a group does not exist.
    """
    reward = np.asarray(rewards, np.float64)
    group = np.asarray(groups, np.int64)
    length = np.asarray(lengths, np.float64)
    _check(reward, group, length)
    advantages = np.zeros(reward.shape, np.float64)
    stats: dict[str, float] = {}
    flat = 0
    for index, (role, kind) in enumerate(GROUPS):
        member = group == index
        if not member.any():
            continue
        r = reward[member]
        weight = length[member] if whitening == "token" else np.ones_like(r)
        total = weight.sum()
        mean = float((weight * r).sum() / total)
        spread = float(r.max() - r.min())
        # Compared by value, not by the computed variance, which rounding leaves a little above 0 for equal rewards.
        variance = float((weight * (r - mean) ** 2).sum() / (total - ddof)) if spread > 0 else 0.0
        if spread > 0:
            advantages[member] = (r - mean) / np.sqrt(variance + eps)
        else:
            flat += len(r)
        name = f"{role.value}_{kind.value}"
        stats |= {f"{name}/mean": mean, f"{name}/std": float(np.sqrt(variance))}
    stats["zero_share"] = flat / max(len(reward), 1)
    return advantages.astype(np.float32), stats


def _check(reward: NDArray[np.float64], group: NDArray[np.int64], length: NDArray[np.float64]) -> None:
    if not reward.shape == group.shape == length.shape or reward.ndim != 1:
        raise ValueError(f"rewards {reward.shape}, groups {group.shape} and lengths {length.shape} must be equal [N]")
    if not np.isfinite(reward).all():
        raise ValueError("a reward is not finite")
    if (length < 1).any():
        raise ValueError("a trajectory without response tokens cannot be trained on")
    if ((group < 0) | (group >= len(GROUPS))).any():
        raise ValueError(f"groups must lie in 0..{len(GROUPS) - 1}")
