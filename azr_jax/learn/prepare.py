"""From a step's trajectories to the batch the update eats: which ones count, their advantages, the weight of a token.

Everything that needs the whole batch happens here, on the host, in float64: overlong responses, advantages, and the
normalisation of the loss. The compiled update only multiplies, adds up and divides once by `denominator`, so the result
cannot depend on how rows are packed or spread over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from azr_jax.config import PRESETS, Config
from azr_jax.learn.advantage import global_baseline, sample_relative, task_relative
from azr_jax.learn.packing import PackedBatch, Trajectory, micro_bound, pack
from azr_jax.tasks.kinds import GROUPS, KINDS

#: The last share of the longest response over which the overlong penalty rises to 1 (DAPO, arXiv 2503.14476, Eq. 13
#: with its L_cache / L_max of 4,096 / 20,480).
PENALTY_SHARE = 0.2


def prepare(trajectories: Sequence[Trajectory], config: Config, rows: int) -> tuple[PackedBatch, dict[str, float]]:
    """The batch, `rows` rows a micro-batch, and `task_relative`'s statistics. Its shape depends on the config only."""
    kept = overlong(trajectories, config)
    advantages, stats = advantages_of(kept, config)
    weights, denominator = token_weights(kept, config)
    return pack(kept, advantages, row_tokens(config), rows, most_micro(config, rows), weights, denominator), stats


def row_tokens(config: Config) -> int:
    """Tokens of a packed row: `learn.row_tokens`, or as many as the longest trajectory has."""
    return config.learn.row_tokens or config.rollout.max_prompt + config.rollout.max_response


def most_micro(config: Config, rows: int) -> int:
    """The static number of micro-batches of `rows` rows: what the largest possible step may need."""
    longest = config.rollout.max_prompt + config.rollout.max_response
    return micro_bound(most_trajectories(config), longest, row_tokens(config), rows)


def most_trajectories(config: Config) -> int:
    """How many trajectories the largest possible step has."""
    reused = len(KINDS) * config.tasks.samples if config.learn.reuse_estimates else 0
    return (len(GROUPS) + reused) * config.tasks.batch


def overlong(trajectories: Sequence[Trajectory], config: Config) -> list[Trajectory]:
    """What becomes of responses that were cut at max_response (`learn.overlong`).

    score: nothing, they are worth what they earned. mask: they leave the batch, its baselines and its denominator
    (DAPO's overlong filtering). penalty: long ones, cut or not, lose up to 1 of their reward (DAPO's soft punishment).
    """
    if config.learn.overlong == "mask":
        return [t for t in trajectories if not t.truncated]
    if config.learn.overlong == "penalty":
        most = config.rollout.max_response
        free = most * (1 - PENALTY_SHARE)

        def penalty(t: Trajectory) -> float:
            return min(max(len(t.response) - free, 0.0) / (most - free), 1.0)

        return [replace(t, reward=t.reward - penalty(t)) for t in trajectories]
    return list(trajectories)


def advantages_of(trajectories: Sequence[Trajectory], config: Config) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Advantages [N] float32 by `learn.advantage`, and the statistics of `task_relative`."""
    rewards = [t.reward for t in trajectories]
    lengths = [len(t.response) for t in trajectories]
    whitening = PRESETS[config.preset].whitening
    advantages, stats = task_relative(rewards, [t.group for t in trajectories], lengths, whitening)
    kind = config.learn.advantage
    if kind == "global":
        return global_baseline(rewards, lengths, whitening), stats
    if kind in ("grpo", "rloo"):
        return sample_relative(rewards, [t.task for t in trajectories], advantages, kind == "rloo"), stats
    return advantages, stats


def token_weights(trajectories: Sequence[Trajectory], config: Config) -> tuple[NDArray[np.float32], float]:
    """Weight [N] of each token of a trajectory, and the number the weighted sum over all tokens is divided by.

    token-mean: every token counts the same. sequence-mean: every trajectory does (GRPO). constant: as sequence-mean,
    with max_response in place of a trajectory's own length, so that long wrong answers are not let off (Dr. GRPO,
    arXiv 2503.20783, section 3.2). group-mean: each (role, kind) present counts the same, its tokens alike.
    """
    lengths = np.array([len(t.response) for t in trajectories], np.float64)
    kind = config.learn.aggregation
    if kind == "token-mean":
        return np.ones(len(lengths), np.float32), float(lengths.sum())
    if kind == "sequence-mean":
        return (1 / lengths).astype(np.float32), float(len(lengths))
    if kind == "constant":
        return np.full(len(lengths), 1 / config.rollout.max_response, np.float32), float(len(lengths))
    groups = np.array([t.group for t in trajectories], np.int64)
    tokens = np.bincount(groups, lengths, minlength=len(GROUPS))
    return (1 / tokens[groups]).astype(np.float32), float((tokens > 0).sum())
