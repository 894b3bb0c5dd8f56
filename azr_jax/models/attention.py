"""Attention for training, prefill and decoding, with one rule of who sees whom.

What stands here is plain XLA and runs everywhere: it is the reference that the faster kernels (attention_kernels.py,
behind the same functions) are tested against. Long rows are never expanded to [T, T] scores (attention_blocks.py), and
pages are read a block at a time. Which kernel a run uses is decided in attention_choice.py; here `kind` says it.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from azr_jax.models.attention_blocks import SMALLEST_BLOCK, attend_blocks
from azr_jax.models.visibility import Visibility

Array = jax.Array

#: Rows whose chunks of a working cache are read together: each group reads as far as its longest row.
ROWS_AT_ONCE = 2

#: Tokens of a paged cache read at once.
PAGED_TOKENS = 256


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
    if max(q.shape[1], k.shape[1]) > SMALLEST_BLOCK:
        return attend_blocks(q, k, v, visibility, scale, window)
    return _attend_piece(q, k, v, visibility, scale, window)


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
    """`attend` with all scores [B, KV, H / KV * T, S] at once."""
    b, t, h, hd = q.shape
    kv, s = k.shape[2], k.shape[1]
    seen = visibility.mask(window)  # [B, T, S]
    # Heads before tokens: XLA's matrix products on CPU are slow on any other order.
    q = q.reshape(b, t, kv, h // kv, hd).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, hd)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, KV, S, hd]
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores.reshape(b, kv, h // kv, t, s), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, kv, -1, s)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(b, kv, h // kv, t, hd)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, hd)
    return jnp.where(jnp.any(seen, axis=-1)[:, :, None, None], out, 0)


def attend_decode(
    q: Array, k: Array, v: Array, positions: Array, *, scale: float, window: int | None = None, chunk: int = 0
) -> Array:
    """One query a row over a cache: q [B, 1, H, hd], k and v [B, KV, N, hd] -> [B, 1, H, hd] in v's dtype.

    positions int32 [B]: of the query, which sees columns 0 to its own. chunk: columns read at once, a divisor of N;
    then chunks after the last position of all rows are not read, and a row's result does not depend on N, bit for bit.
    0: all N at once.
    Multiply-and-sum rather than matrix products: with one query a row it is bound by reading the cache, and XLA fuses
    it into one pass on CPU.
    """
    b, _, h, hd = q.shape
    kv, n = k.shape[1:3]
    size = chunk or n
    rows = gcd(b, ROWS_AT_ONCE) if chunk else b
    q = q.reshape(b, kv, h // kv, 1, hd).astype(jnp.float32)

    def some_rows(first: Array | int) -> Array:
        queries = lax.dynamic_slice_in_dim(q, first, rows)
        at = lax.dynamic_slice_in_dim(positions, first, rows)

        def read(index: Array | int, carry: Softmax) -> Softmax:
            keys, values = (lax.dynamic_slice(x, (first, 0, index * size, 0), (rows, kv, size, hd)) for x in (k, v))
            distance = at[:, None] - (index * size + jnp.arange(size))  # [rows, size]
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            scores = jnp.sum(queries * keys[:, :, None], axis=-1) * scale  # [rows, KV, G, size]
            scores = jnp.where(seen[:, None, None], scores, -1e30)
            top = jnp.maximum(carry.top, jnp.max(scores, axis=-1))
            weights = jnp.where(seen[:, None, None], jnp.exp(scores - top[..., None]), 0)
            kept = jnp.exp(carry.top - top)  # 1 exactly for a row whose columns are all read
            new = jnp.sum(weights[..., None] * values[:, :, None], axis=-2)
            return Softmax(carry.total * kept[..., None] + new, carry.norm * kept + jnp.sum(weights, axis=-1), top)

        start = Softmax.empty((rows, kv, h // kv), hd)
        if not chunk:
            return read(0, start).result()
        live = jnp.minimum(jnp.max(at) // size + 1, n // size)
        return lax.fori_loop(0, live, read, start).result()

    if rows == b:
        return some_rows(0).reshape(b, 1, h, hd).astype(v.dtype)

    def fill(index: Array, out: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(out, some_rows(index * rows), index * rows, axis=0)

    out = lax.fori_loop(0, b // rows, fill, jnp.zeros((b, kv, h // kv, hd)))
    return out.reshape(b, 1, h, hd).astype(v.dtype)


class Softmax(NamedTuple):
    """A softmax-weighted sum in the making, over keys that come in pieces. S: any shape of queries."""

    total: Array  # float32 [*S, hd], sum of exp(score - top) * value
    norm: Array  # float32 [*S], sum of exp(score - top)
    top: Array  # float32 [*S], largest score so far

    @classmethod
    def empty(cls, shape: tuple[int, ...], hd: int) -> Softmax:
        """Of no keys."""
        return cls(jnp.zeros((*shape, hd)), jnp.zeros(shape), jnp.full(shape, -1e30))

    def result(self) -> Array:
        """float32 [*S, hd]; zeros where there was no key."""
        return self.total / jnp.where(self.norm == 0, 1, self.norm)[..., None]


def attend_paged(
    q: Array,
    pages: Array,
    table: Array,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    scales: Array | None = None,
    kind: str = "xla",
    mesh: Mesh | None = None,
) -> Array:
    """The newest T tokens of each row over a cache in pages -> [B, T, H, hd] in q's dtype.

    q [B, T, H, hd]; pages [S, P, page_size, 2 KV, hd] with keys at even and values at odd heads (as the TPU kernel
    wants them), possibly with columns of padding after hd; S shards, each with B / S of the rows, in order.
    table int32 [B, max_pages]: the pages of a row, in order and counted in its shard, any valid page where it has no
    more; lengths int32 [B]: tokens in the cache, the T new ones included. A query whose position lengths - T + t is
    negative is padding and gives zeros, so an empty slot has length 0.
    scales [S, P, page_size, 2 KV]: what int8 pages are to be multiplied with; None: pages are what they say.
    kind: "splash" uses the TPU's ragged paged kernel where it can (`attention_kernels.ragged_can`), all others XLA.
    A row's result depends on its own tokens alone, bit for bit: not on other rows, lengths or page numbers.
    """
    if kind == "splash":
        from azr_jax.models import attention_kernels

        if attention_kernels.ragged_can(pages):
            return attention_kernels.ragged(q, pages, table, lengths, scale, window, mesh)
    shards, page = pages.shape[0], pages.shape[2]
    block = max(1, PAGED_TOKENS // page)  # pages read at once
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block)))
    live_blocks = (jnp.max(lengths) + block * page - 1) // (block * page)

    def own(x: Array) -> Array:  # [B, ...] -> [S, B / S, ...]
        return x.reshape(shards, -1, *x.shape[1:])

    def of_shard(q: Array, pages: Array, scales: Array | None, table: Array, lengths: Array) -> Array:
        return _attend_pages(q, pages, scales, table, lengths, live_blocks, block, scale, window)

    parts = jax.vmap(of_shard)(own(q), pages, scales, own(table), own(lengths))
    return parts.reshape(q.shape).astype(q.dtype)


def _attend_pages(
    q: Array,
    pages: Array,
    scales: Array | None,
    table: Array,
    lengths: Array,
    live_blocks: Array,
    block: int,
    scale: float,
    window: int | None,
) -> Array:
    """`attend_paged` in one shard, reading `block` pages of every row at a time."""
    b, t, h, hd = q.shape
    page, kv = pages.shape[1], pages.shape[2] // 2
    positions = lengths[:, None] - t + jnp.arange(t)  # [B, T]
    q = q.reshape(b, t, kv, h // kv, hd)

    def read(index: Array, carry: Softmax) -> Softmax:
        chosen = lax.dynamic_slice_in_dim(table, index * block, block, axis=1)
        blocks = pages[chosen][..., :hd]  # [B, block, page, 2 KV, hd]
        if scales is not None:
            blocks = blocks.astype(q.dtype) * scales[chosen][..., None].astype(q.dtype)
        blocks = blocks.reshape(b, block * page, kv, 2, hd)
        keys, values = blocks[:, :, :, 0], blocks[:, :, :, 1]  # [B, S, KV, hd]
        at = jnp.broadcast_to(index * block * page + jnp.arange(block * page), (b, block * page))
        live = (at < lengths[:, None]).astype(jnp.int32)
        seen = Visibility(jnp.ones_like(positions), live, positions, at).mask(window)[:, None, None]  # [B, 1, 1, T, S]
        values = jnp.where(live[:, :, None, None] == 1, values, 0)  # memory never written may hold NaN
        scores = jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen, scores, -1e30)
        top = jnp.maximum(carry.top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
        kept = jnp.exp(carry.top - top)  # 1 exactly for a row whose pages are all read
        norm = carry.norm * kept + jnp.sum(weights, axis=-1)
        weights = weights.astype(values.dtype)
        new = jnp.einsum("bkgts,bskh->bkgth", weights, values, preferred_element_type=jnp.float32)
        return Softmax(carry.total * kept[..., None] + new, norm, top)

    out = lax.fori_loop(0, live_blocks, read, Softmax.empty((b, kv, h // kv, t), hd)).result()
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, hd)
