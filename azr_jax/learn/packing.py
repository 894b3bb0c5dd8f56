"""Trajectories into rows of a fixed length: several sequences share a row, told apart by segment ids.

Shapes never change from step to step (one compile); what changes is how many of the micro-batches are used. Token ids
come from the rollout engine as they are: nothing is re-encoded, appended or cut here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trajectory:
    """One rollout, as the engine produced it.

    prompt:   int32 [P], P >= 1.
    response: int32 [R], R >= 1, includes the sampled EOS if one was sampled, nothing appended.
    logprobs: float32 [R], the sampler's own, at the rollout temperature.
    reward:   what the trajectory earned.
    group:    `kinds.group_index` of its role and kind.
    task:     number of the task it is one of several answers to; -1 for a proposal.
    truncated: whether it was cut at max_response.
    """

    prompt: NDArray[np.int32]
    response: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    reward: float
    group: int
    task: int = -1
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows, micro-batch by micro-batch; every array is [M, rows, T] and position t describes token t.

    tokens, positions (from 0 in each segment), segments (0 is padding) and group (-1 outside responses) are int32;
    loss_mask (1 on response tokens), weights, old_logprobs and advantages (0 outside responses) are float32.
    Only the first n_micro micro-batches hold anything. The loss is a sum of token losses times weights, divided by
    `denominator` (prepare.py).
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    loss_mask: NDArray[np.float32]
    weights: NDArray[np.float32]
    old_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    group: NDArray[np.int32]
    n_micro: int
    denominator: float

    @property
    def padding_share(self) -> float:
        """Share of the positions the device computes (those of the micro-batches in use) that are padding."""
        used = self.segments[: self.n_micro]
        return float((used == 0).mean()) if used.size else 0.0


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float] | NDArray[np.float32],
    row_tokens: int,
    rows: int,
    max_micro: int,
    weights: Sequence[float] | NDArray[np.float32] | None = None,
    denominator: float | None = None,
) -> PackedBatch:
    """Packs by first-fit-decreasing into rows of `row_tokens`, `rows` rows a micro-batch, shapes [max_micro, rows, T].

    weights: of each trajectory's tokens in the loss, and the number their sum is divided by (None: the token mean).

    ValueError: a trajectory has no prompt, no response, as many log-probs as not response tokens, or is longer than a
    row; or all of them need more than max_micro micro-batches (see `micro_bound`).
    """
    if len(advantages) != len(trajectories):
        raise ValueError(f"{len(advantages)} advantages for {len(trajectories)} trajectories")
    weights = np.ones(len(trajectories), np.float32) if weights is None else weights
    if denominator is None:
        denominator = float(sum(len(t.response) for t in trajectories))
    for index, trajectory in enumerate(trajectories):
        _check(index, trajectory, row_tokens)
    assigned = first_fit_decreasing([len(t) for t in trajectories], row_tokens)
    n_micro = -(-len(assigned) // rows)
    if n_micro > max_micro:
        needed = f"{len(assigned)} rows of {row_tokens} tokens need {n_micro} micro-batches"
        raise ValueError(f"{needed}, max_micro is {max_micro}")
    shape = (max_micro * rows, row_tokens)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask, token_weights, old_logprobs, token_advantages = (np.zeros(shape, np.float32) for _ in range(4))
    group = np.full(shape, -1, np.int32)
    for row, members in enumerate(assigned):
        start = 0
        for segment, index in enumerate(members, start=1):
            trajectory = trajectories[index]
            middle, end = start + len(trajectory.prompt), start + len(trajectory)
            tokens[row, start:middle] = trajectory.prompt
            tokens[row, middle:end] = trajectory.response
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
            group[row, middle:end] = trajectory.group
            loss_mask[row, middle:end] = 1.0
            token_weights[row, middle:end] = weights[index]
            old_logprobs[row, middle:end] = trajectory.logprobs
            token_advantages[row, middle:end] = advantages[index]
            start = end
    batch = (max_micro, rows, row_tokens)
    return PackedBatch(
        tokens=tokens.reshape(batch),
        positions=positions.reshape(batch),
        segments=segments.reshape(batch),
        loss_mask=loss_mask.reshape(batch),
        weights=token_weights.reshape(batch),
        old_logprobs=old_logprobs.reshape(batch),
        advantages=token_advantages.reshape(batch),
        group=group.reshape(batch),
        n_micro=n_micro,
        denominator=denominator,
    )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items in each bin: longest first, each into the first bin with room (at most 11/9 OPT + 1)."""
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = np.flatnonzero(room[: len(bins)] >= lengths[index])
        if len(fits):
            chosen = int(fits[0])
        else:
            chosen = len(bins)
            bins.append([])
            room[chosen] = capacity
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


def micro_bound(n: int, longest: int, row_tokens: int, rows: int) -> int:
    """Most micro-batches that n trajectories of at most `longest` tokens can need: the static M of `pack`.

    A bin that refused an item holds more than capacity - longest tokens, hence at least capacity // longest items.
    """
    per_row = max(row_tokens // longest, 1)
    return -(-n // (per_row * rows))


def _check(index: int, trajectory: Trajectory, row_tokens: int) -> None:
    if len(trajectory) > row_tokens:
        raise ValueError(f"trajectory {index} has {len(trajectory)} tokens, a row holds {row_tokens}")
    if not len(trajectory.prompt) or not len(trajectory.response):
        raise ValueError(f"trajectory {index} needs at least one prompt token and one response token")
    if len(trajectory.logprobs) != len(trajectory.response):
        raise ValueError(f"trajectory {index}: {len(trajectory.logprobs)} log-probs, {len(trajectory.response)} tokens")
