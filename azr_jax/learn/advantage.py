"""Advantages: task-relative REINFORCE++ (TRR++), one baseline for each (role, kind) pair, and three alternatives.

The reward of a trajectory is compared with those of its group, over the *global* batch of the step: every host calls
this with the trajectories of all hosts, so that no shard has statistics of its own. Runs on the host in float64; a
batch is a few hundred numbers. It holds no state: there is no running baseline and no critic.
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


Rewards = NDArray[np.float64]
Whitening = Literal["sequence", "token"]


def task_relative(
    rewards: ArrayLike,
    groups: Sequence[int] | ArrayLike,
    lengths: ArrayLike,
    whitening: Whitening = "sequence",
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
    reward, group, length = _checked(rewards, groups, lengths)
    advantages = np.zeros(reward.shape, np.float64)
    stats: dict[str, float] = {}
    flat = 0
    for index, (role, kind) in enumerate(GROUPS):
        member = group == index
        if not member.any():
            continue
        advantages[member], mean, std = _whiten(reward[member], length[member], whitening, eps, ddof)
        flat += 0 if std else int(member.sum())
        name = f"{role.value}_{kind.value}"
        stats |= {f"{name}/mean": mean, f"{name}/std": std}
    stats["zero_share"] = flat / max(len(reward), 1)
    return advantages.astype(np.float32), stats


def global_baseline(rewards: ArrayLike, lengths: ArrayLike, whitening: Whitening = "sequence") -> NDArray[np.float32]:
    """One baseline for all trajectories of the step: REINFORCE++ (arXiv 2501.03262, Eq. 9 without its KL term)."""
    reward, _, length = _checked(rewards, np.zeros(np.shape(rewards), np.int64), lengths)
    return _whiten(reward, length, whitening, EPS, DDOF)[0].astype(np.float32)


def sample_relative(
    rewards: ArrayLike, samples: Sequence[int] | ArrayLike, fallback: ArrayLike, leave_one_out: bool
) -> NDArray[np.float32]:
    """A baseline for each task, from the solver's own samples of it.

    samples [N] int: which task a trajectory is a sample of; -1 for those that are none (proposals), which keep
    `fallback` [N]. GRPO (arXiv 2402.03300, section 4.1.2): (r - mean) / sqrt(var + eps). RLOO (arXiv 2402.14740,
    section 2): r minus the mean of the other samples. A task with one sample has advantage 0.
    """
    reward, sample = np.asarray(rewards, np.float64), np.asarray(samples, np.int64)
    advantages = np.array(fallback, np.float64)
    for task in set(sample[sample >= 0].tolist()):
        member = sample == task
        r, n = reward[member], int(member.sum())
        if leave_one_out:
            advantages[member] = (r - r.mean()) * (n / (n - 1) if n > 1 else 0.0)
        else:
            advantages[member] = _whiten(r, np.ones(n), "sequence", EPS, DDOF)[0]
    return advantages.astype(np.float32)


def _whiten(r: Rewards, length: Rewards, whitening: Whitening, eps: float, ddof: int) -> tuple[Rewards, float, float]:
    """Advantages, mean and standard deviation of one group; zeros and std 0 if its rewards are all equal."""
    if not len(r):
        return r, 0.0, 0.0
    weight = length if whitening == "token" else np.ones_like(r)
    total = weight.sum()
    mean = float((weight * r).sum() / total)
    # Compared by value, not by the computed variance, which rounding leaves a little above 0 for equal rewards.
    if r.max() == r.min():
        return np.zeros_like(r), mean, 0.0
    variance = float((weight * (r - mean) ** 2).sum() / (total - ddof))
    return (r - mean) / np.sqrt(variance + eps), mean, float(np.sqrt(variance))


def _checked(rewards: ArrayLike, groups: ArrayLike, lengths: ArrayLike) -> tuple[Rewards, NDArray[np.int64], Rewards]:
    reward, group = np.asarray(rewards, np.float64), np.asarray(groups, np.int64)
    length = np.asarray(lengths, np.float64)
    if not reward.shape == group.shape == length.shape or reward.ndim != 1:
        raise ValueError(f"rewards {reward.shape}, groups {group.shape} and lengths {length.shape} must be equal [N]")
    if not np.isfinite(reward).all():
        raise ValueError("a reward is not finite")
    if (length < 1).any():
        raise ValueError("a trajectory without response tokens cannot be trained on")
    if ((group < 0) | (group >= len(GROUPS))).any():
        raise ValueError(f"groups must lie in 0..{len(GROUPS) - 1}")
    return reward, group, length
