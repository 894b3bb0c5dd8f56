"""Attention for training, prefill and decoding, with one rule of who sees whom.

What stands here is plain XLA and runs everywhere: it is the reference that the faster kernels (attention_kernels.py,
behind the same functions) are tested against. Long rows are never expanded to [T, T] scores: queries go through in
chunks, recomputed in the backward pass, and pages are read a block at a time. Which kernel a run uses is decided in
attention_choice.py; here `kind` says it.
"""

from __future__ import annotations

from functools import partial
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

#: Tokens of a paged cache read at once.
PAGED_TOKENS = 256


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
    kind: "xla", "splash" (TPU) or "cudnn" (GPU). The last two are for rows among themselves (`Visibility.within`) in
    which segments are contiguous and positions count up by one, and ValueError for anything else than T == S.
    mesh: the mesh the arrays lie on, which those two need; rows go over (data, fsdp) and heads over tensor.
    """
    if kind != "xla":
        return _attend_kernel(q, k, v, visibility, scale, window, kind, mesh)
    b, t, h, _ = q.shape
    chunk = max(SMALLEST_CHUNK, SCORES_AT_ONCE // (b * h * k.shape[1]))
    if t <= chunk:
        return _attend_piece(q, k, v, visibility, scale, window)
    chunks = -(-t // chunk)
    return _attend_chunks(q, k, v, visibility, scale, window, -(-t // chunks))


def _attend_kernel(
    q: Array, k: Array, v: Array, visibility: Visibility, scale: float, window: int | None, kind: str, mesh: Mesh | None
) -> Array:
    from azr_jax.models import attention_kernels as kernels  # imports Pallas, which the reference does without

    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{kind} attention is for rows among themselves: {q.shape[1]} queries, {k.shape[1]} keys")
    if kind == "splash":
        kernel = partial(kernels.splash, scale=scale, window=window)
    elif kind == "cudnn" and window is None:
        kernel = partial(kernels.cudnn, scale=scale)
    elif kind == "cudnn":  # no windows in packed rows
        return attend(q, k, v, visibility, scale=scale, window=window)
    else:
        raise ValueError(f"unknown kind of attention {kind!r}; there are xla, splash and cudnn")
    return kernels.over_mesh(kernel, q, k, v, visibility, mesh)


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


def attend_paged(
    q: Array,
    pages: Array,
    table: Array,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    kind: str = "xla",
    mesh: Mesh | None = None,
) -> Array:
    """The newest T tokens of each row over a cache in pages -> [B, T, H, hd] in q's dtype.

    q [B, T, H, hd]; pages [P, page_size, 2 KV, hd] with keys at even and values at odd heads (as the TPU kernel wants
    them), possibly with columns of padding after hd; table int32 [B, max_pages]: the pages of a row, in order, any
    valid page where it has no more; lengths int32 [B]: tokens in the cache, the T new ones included. A query whose
    position lengths - T + t is negative is padding and gives zeros, so an empty slot has length 0.
    kind: "splash" uses the TPU's ragged paged kernel where it can (`attention_kernels.ragged_can`), all others XLA.
    A row's result depends on its own tokens alone, bit for bit: not on other rows, lengths or page numbers.
    """
    if kind == "splash":
        from azr_jax.models import attention_kernels

        if attention_kernels.ragged_can(pages):
            return attention_kernels.ragged(q, pages, table, lengths, scale, window, mesh)
    b, t, h, hd = q.shape
    page, kv = pages.shape[1], pages.shape[2] // 2
    block = max(1, PAGED_TOKENS // page)  # pages read at once
    positions = lengths[:, None] - t + jnp.arange(t)  # [B, T]
    q = q.reshape(b, t, kv, h // kv, hd)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block)))

    def read(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, norm, largest = carry  # [B, KV, G, T, hd], [B, KV, G, T] twice
        blocks = pages[lax.dynamic_slice_in_dim(table, index * block, block, axis=1)]  # [B, block, page, 2 KV, hd]
        blocks = blocks.reshape(b, block * page, kv, 2, -1)[..., :hd]
        keys, values = blocks[:, :, :, 0], blocks[:, :, :, 1]  # [B, S, KV, hd]
        at = jnp.broadcast_to(index * block * page + jnp.arange(block * page), (b, block * page))
        live = (at < lengths[:, None]).astype(jnp.int32)
        seen = Visibility(jnp.ones_like(positions), live, positions, at).mask(window)[:, None, None]  # [B, 1, 1, T, S]
        values = jnp.where(live[:, :, None, None] == 1, values, 0)  # memory never written may hold NaN
        scores = jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, scores, -1e30)
        top = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
        kept = jnp.exp(largest - top)  # 1 exactly for a row whose pages are all read
        norm = norm * kept + jnp.sum(weights, axis=-1)
        weights = weights.astype(values.dtype)
        new = jnp.einsum("bkgts,bskh->bkgth", weights, values, preferred_element_type=jnp.float32)
        return total * kept[..., None] + new, norm, top

    shape = (b, kv, h // kv, t)
    start = jnp.zeros((*shape, hd), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, -1e30, jnp.float32)
    live_blocks = (jnp.max(lengths) + block * page - 1) // (block * page)
    total, norm, _ = lax.fori_loop(0, live_blocks, read, start)
    out = total / jnp.where(norm == 0, 1, norm)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, hd).astype(q.dtype)
