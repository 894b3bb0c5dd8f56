"""Attention, one function for training, prefill and scoring and one for decoding, with one rule of who sees whom.

`attend` and `attend_decode` here are the reference: plain XLA, right on every platform. Faster kernels stand behind
the same signature (attention_kernels.py) and are held to this one by tests. Rows are never expanded to [T, T] scores
when they are long: queries go through in chunks, recomputed in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

Array = jax.Array

#: Scores computed at once, over all rows and heads: 512 MiB of float32. Below it all queries go in one piece.
SCORES_AT_ONCE = 2**27

#: Fewest queries in a chunk: smaller matrix products would leave an accelerator idle.
SMALLEST_CHUNK = 128


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


def attend(
    q: Array,
    k: Array,
    v: Array,
    visibility: Visibility,
    *,
    scale: float,
    window: int | None = None,
    kind: str = "xla",
    mesh: Mesh | None = None,
) -> Array:
    """Grouped-query attention, softmax in float32.

    q [B, T, H, hd], k and v [B, S, KV, hd] -> [B, T, H, hd] in v's dtype, zeros for a query that sees nothing.
    Query head h reads key head h // (H / KV); scores are multiplied by `scale`.
    """
    b, t, h, _ = q.shape
    chunk = max(SMALLEST_CHUNK, SCORES_AT_ONCE // (b * h * k.shape[1]))
    if t <= chunk:
        return _attend_piece(q, k, v, visibility, scale, window)
    chunks = -(-t // chunk)
    return _attend_chunks(q, k, v, visibility, scale, window, -(-t // chunks))


def _attend_piece(q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None) -> Array:
    """`attend` with all scores [B, KV, H / KV, T, S] at once."""
    b, t, h, hd = q.shape
    kv = k.shape[2]
    seen = visibility.mask(window)  # [B, T, S]
    q = q.reshape(b, t, kv, h // kv, hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, h, hd)
    return jnp.where(jnp.any(seen, axis=-1)[:, :, None, None], out, 0)


def _attend_chunks(
    q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None, chunk: int
) -> Array:
    """`attend` with the scores of `chunk` queries at a time, in the forward and in the backward pass."""
    t = q.shape[1]
    # The gradients of k and v are sums over chunks: float32 here makes them be summed in float32.
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def piece(queries: tuple[Array, Array, Array], k32: Array, v32: Array) -> Array:
        q, segments, positions = queries
        seen = visibility._replace(q_segments=segments, q_positions=positions)
        return _attend_piece(q, k32.astype(k.dtype), v32.astype(v.dtype), seen, scale, window)

    def split(x: Array) -> Array:  # [B, T, ...] -> [T / chunk, B, chunk, ...], padded with segment 0
        x = jnp.pad(x, ((0, 0), (0, -t % chunk), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    queries = jax.tree.map(split, (q, visibility.q_segments, visibility.q_positions))
    out = lax.map(lambda chunk: piece(chunk, k32, v32), queries)  # [T / chunk, B, chunk, H, hd]
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :t]


def attend_decode(
    q: Array, k: Array, v: Array, visibility: Visibility, *, scale: float, window: int | None = None
) -> Array:
    """One query a row over a cache: q [B, 1, H, hd], k and v [B, KV, N, hd] -> [B, 1, H, hd] in v's dtype.

    Multiply-and-sum rather than matrix products: with one query a row it is bound by reading the cache, and XLA
    fuses it into one pass on CPU. Columns not written yet have positions after the query's.
    """
    b, _, h, hd = q.shape
    kv = k.shape[1]
    seen = visibility.mask(window)[:, 0]  # [B, N]
    q = q.reshape(b, kv, h // kv, 1, hd).astype(jnp.float32)
    scores = jnp.sum(q * k[:, :, None], axis=-1) * scale  # [B, KV, G, N]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
    return jnp.sum(weights[..., None] * v[:, :, None], axis=-2).reshape(b, 1, h, hd).astype(v.dtype)
