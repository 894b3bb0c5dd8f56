"""Attention of packed rows in blocks of queries by blocks of keys, over those blocks only where something is seen.

A row of several segments is mostly pairs that do not see each other: of 1,024 tokens in segments of 250, seven eighths.
For each block of queries the loop runs from the first block of keys that any of them sees, in any row, to the last,
with a running softmax; the backward pass computes the scores again (FlashAttention-2, arXiv 2307.08691, in plain XLA).
So memory grows with the row, not with its square. Blocks of all rows go together: rows may lie on many devices.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from azr_jax.models.visibility import Visibility

Array = jax.Array

#: Queries and keys of a block: at least so many (below, loops cost more than they skip on a CPU), and of a long row so
#: many that it has at most MOST_BLOCKS of them, because an accelerator wants large products.
SMALLEST_BLOCK = 128
MOST_BLOCKS = 16
#: Score of a pair that does not see each other, and where the running maximum starts: the first must be the smaller.
UNSEEN, LOWEST = -1e30, -1e29


class Split(NamedTuple):
    """Queries, keys and values in blocks of C tokens, and who sees whom.

    q [N, B, KV, G * C, hd]; k, v [M, B, KV, C, hd]; q_side: segments and positions [N, B, C]; k_side: the same of all
    keys, [B, M * C].
    """

    q: Array
    k: Array
    v: Array
    q_side: tuple[Array, Array]
    k_side: tuple[Array, Array]


def attend_blocks(q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None) -> Array:
    """`attend` for rows of any length: q [B, T, H, hd], k and v [B, S, KV, hd] -> [B, T, H, hd] in v's dtype."""
    size = max(SMALLEST_BLOCK, -(-max(q.shape[1], k.shape[1]) // MOST_BLOCKS))
    return _blocks(q, k, v, visibility, scale, window, size)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocks(q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None, size: int) -> Array:
    return _forward(q, k, v, visibility, scale, window, size)[0]


def _forward(
    q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None, size: int
) -> tuple:
    split = _split(q, k, v, visibility, size)

    def of_queries(block: tuple[Array, tuple[Array, Array]]) -> tuple[Array, Array]:
        queries, side = block
        seen, first, last = _seen(side, split.k_side, window, size)

        def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, norm, largest = carry  # [B, KV, G * C, hd], [B, KV, G * C] twice
            scores = _scores(queries, _at(split.k, index), _part(seen, index, size), scale)
            top = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - top[..., None])  # 0 exactly where nothing is seen
            kept = jnp.exp(largest - top)
            new = _dot("bkmc,bkch->bkmh", weights.astype(v.dtype), _at(split.v, index))
            return total * kept[..., None] + new, norm * kept + jnp.sum(weights, axis=-1), top

        none = jnp.zeros(queries.shape[:3], jnp.float32)
        start = jnp.zeros(queries.shape, jnp.float32), none, none + LOWEST
        total, norm, largest = lax.fori_loop(first, last, add, start)
        norm = jnp.where(norm == 0, 1, norm)
        return (total / norm[..., None]).astype(v.dtype), largest + jnp.log(norm)

    out, log_norm = lax.map(of_queries, (split.q, split.q_side))  # [N, B, KV, G * C, hd], [N, B, KV, G * C]
    out = _joined(out, q)
    return out, (q, k, v, visibility, out, log_norm)


def _backward(scale: float, window: int | None, size: int, kept: tuple, gradient: Array) -> tuple:
    q, k, v, visibility, out, log_norm = kept
    split = _split(q, k, v, visibility, size)
    # sum_j p_j dp_j of a softmax, from what came out of it. Rows and tokens as one axis: see `rms_norm`.
    d_out, out = (x.astype(jnp.float32).reshape(-1, *q.shape[2:]) for x in (gradient, out))
    share = jnp.sum(d_out * out, axis=-1).reshape(*q.shape[:3], 1)
    gradient, share = (_query_blocks(x, k.shape[2], size) for x in (gradient, share))  # [N, B, KV, G * C, hd or 1]

    def of_queries(carry: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], Array]:
        queries, side, gradient, share, log_norm = block
        seen, first, last = _seen(side, split.k_side, window, size)
        # Keys' gradients as [hd, C], a product of untransposed arrays: XLA on CPU is three times as fast at those.
        turned_queries, turned_gradient = jnp.swapaxes(queries, 2, 3), jnp.swapaxes(gradient, 2, 3)

        def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            keys, values = _at(split.k, index), _at(split.v, index)
            scores = _scores(queries, keys, _part(seen, index, size), scale)
            weights = jnp.exp(scores - log_norm[..., None])  # [B, KV, G * C, C]
            d_weights = _dot("bkmh,bkch->bkmc", gradient, values)
            d_scores = (weights * (d_weights - share) * scale).astype(q.dtype)
            dk = _add_at(dk, _dot("bkhm,bkmc->bkhc", turned_queries, d_scores), index)
            dv = _add_at(dv, _dot("bkhm,bkmc->bkhc", turned_gradient, weights.astype(v.dtype)), index)
            return dq + _dot("bkmc,bkch->bkmh", d_scores, keys), dk, dv

        dq, dk, dv = lax.fori_loop(first, last, add, (jnp.zeros(queries.shape, jnp.float32), *carry))
        return (dk, dv), dq.astype(q.dtype)

    zero = jnp.zeros_like(jnp.swapaxes(split.k, 3, 4), jnp.float32)
    (dk, dv), dq = lax.scan(of_queries, (zero, zero), (split.q, split.q_side, gradient, share, log_norm))

    def keys_joined(x: Array) -> Array:  # [M, B, KV, hd, C] -> [B, S, KV, hd]
        return x.transpose(1, 0, 4, 2, 3).reshape(x.shape[1], -1, *k.shape[2:])[:, : k.shape[1]]

    return _joined(dq, q), keys_joined(dk).astype(k.dtype), keys_joined(dv).astype(v.dtype), None


_blocks.defvjp(_forward, _backward)


def _seen(q_side: tuple, k_side: tuple, window: int | None, size: int) -> tuple[Array, Array, Array]:
    """bool [B, C, M * C], who sees whom, and from which block of keys up to before which one there is anything."""
    seen = Visibility(q_side[0], k_side[0], q_side[1], k_side[1]).mask(window)
    blocks = jnp.any(seen, axis=(0, 1)).reshape(-1, size).any(axis=1)  # [M]
    last = jnp.where(jnp.any(blocks), blocks.size - jnp.argmax(blocks[::-1]), 0)
    return seen, jnp.argmax(blocks), last


def _scores(queries: Array, keys: Array, seen: Array, scale: float) -> Array:
    """float32 [B, KV, G * C, C] of queries [B, KV, G * C, hd], keys [B, KV, C, hd] and seen [B, C, C]."""
    scores = _dot("bkmh,bkch->bkmc", queries, keys) * scale
    b, kv, m, c = scores.shape
    return jnp.where(seen[:, None, None], scores.reshape(b, kv, m // c, c, c), UNSEEN).reshape(scores.shape)


def _split(q: Array, k: Array, v: Array, visibility: Visibility, size: int) -> Split:
    keys, values = (_token_blocks(x, size).transpose(0, 1, 3, 2, 4) for x in (k, v))
    queries = _query_blocks(q, k.shape[2], size)
    q_side = tuple(_token_blocks(x, size) for x in (visibility.q_segments, visibility.q_positions))
    k_side = tuple(_padded(x, size) for x in (visibility.k_segments, visibility.k_positions))
    return Split(queries, keys, values, q_side, k_side)  # type: ignore[arg-type]


def _query_blocks(x: Array, kv: int, size: int) -> Array:
    """[B, T, H, hd] -> [N, B, KV, G * C, hd]: the queries that read one key head lie together."""
    b, t, h, hd = x.shape
    blocks = _token_blocks(x.reshape(b, t, kv, h // kv, hd), size)  # [N, B, C, KV, G, hd]
    return blocks.transpose(0, 1, 3, 4, 2, 5).reshape(-1, b, kv, h // kv * size, hd)


def _joined(x: Array, like: Array) -> Array:
    """The inverse of `_query_blocks`: [N, B, KV, G * C, hd] -> [B, T, H, hd]."""
    b, t, h, hd = like.shape
    n, kv = x.shape[0], x.shape[2]
    x = x.reshape(n, b, kv, h // kv, -1, hd).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, -1, h, hd)[:, :t]


def _token_blocks(x: Array, size: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...], padded with zeros (segment 0)."""
    x = _padded(x, size)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _padded(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))


def _part(seen: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(seen, index * size, size, axis=2)


def _at(x: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _add_at(x: Array, new: Array, index: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, _at(x, index) + new, index, axis=0)


def _dot(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
