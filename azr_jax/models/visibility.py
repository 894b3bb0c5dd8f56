"""Who sees whom in packed rows: the one rule that every form of attention follows."""

from __future__ import annotations

from typing import NamedTuple

import jax

Array = jax.Array


class Visibility(NamedTuple):
    """Query i sees key j when both are in the same segment, and j's position is not after i's (nor out of its window).

    Segment 0 is padding: it sees nothing, nothing sees it. Positions count from 0 in each segment.
    """

    q_segments: Array  # int32 [B, T]
    k_segments: Array  # int32 [B, S]
    q_positions: Array  # int32 [B, T]
    k_positions: Array  # int32 [B, S]

    @classmethod
    def within(cls, segments: Array, positions: Array) -> Visibility:
        """Tokens of packed rows among themselves: int32 [B, T] each."""
        return cls(segments, segments, positions, positions)

    def mask(self, window: int | None = None) -> Array:
        """bool [B, T, S]: who sees whom. window: how many positions a query sees at most, its own included."""
        distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
        same = (self.q_segments[:, :, None] == self.k_segments[:, None, :]) & (self.q_segments != 0)[:, :, None]
        seen = same & (distance >= 0)
        return seen if window is None else seen & (distance < window)
