"""The KV cache on the device: pages for every layer, int8 if wanted, and the working copy CPUs decode from.

Accelerators read pages where they lie. On a CPU a gather of pages costs more than reading them, so a block of decode
steps first copies the pages of its rows into one array a row, and works on that; pages stay what is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.models.attention import attend_decode, attend_paged
from azr_jax.models.attention_kernels import LANES
from azr_jax.models.config import ModelConfig

Array = jax.Array

#: Columns of the working copy that are read at once, where there are more than twice as many.
CHUNK = 128


class Layer(NamedTuple):
    """Pages of one layer: shard S, page P, token places, keys at even and values at odd heads."""

    pages: Array  # [S, P, page, 2 KV, hd], int8 or the weights' dtype
    scales: Array | None  # float32 [S, P, page, 2 KV]: an int8 value times its scale is the key or value


class Working(NamedTuple):
    """A layer's keys and values of the rows of a batch in one piece, B rows, N columns."""

    keys: Array  # [B, KV, N, hd]
    values: Array  # [B, KV, N, hd]


class Layout(NamedTuple):
    """Sizes and kinds of a cache. Hashable."""

    shards: int
    pages: int  # of a shard
    page: int  # tokens
    dtype: str  # "float32", "bfloat16" or "int8"
    compute_dtype: str  # of what attention reads
    kind: str  # of attention: "working" (a copy of rows), "splash" (TPU kernel where it can) or "xla" (pages)
    chunk: int = 0  # columns of a working copy that are read at once; 0: all

    def bytes_per_page(self, model: ModelConfig) -> int:
        """Of one page in all layers."""
        heads = 2 * model.num_kv_heads * model.num_layers * self.page
        scale = 4 if self.dtype == "int8" else 0
        return heads * (self.columns(model) * jnp.dtype(self.dtype).itemsize + scale)

    def columns(self, model: ModelConfig) -> int:
        """Columns of a head; the TPU kernel wants full registers."""
        wide = self.kind == "splash" and self.dtype != "int8" and model.head_dim < LANES
        return LANES if wide else model.head_dim


def shapes(layout: Layout, model: ModelConfig, mesh: Mesh) -> tuple[Layer, ...]:
    """The cache as ShapeDtypeStructs with shardings: shards over data, heads over tensor where they divide."""
    heads = "tensor" if model.num_kv_heads % mesh.shape["tensor"] == 0 else None
    where = NamedSharding(mesh, PartitionSpec("data", None, None, heads))
    shape = (layout.shards, layout.pages, layout.page, 2 * model.num_kv_heads, layout.columns(model))
    pages: Any = jax.ShapeDtypeStruct(shape, layout.dtype, sharding=where)
    scales: Any = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=where) if layout.dtype == "int8" else None
    return (Layer(pages, scales),) * model.num_layers


def allocate(layout: Layout, model: ModelConfig, mesh: Mesh) -> tuple[Layer, ...]:
    """An empty cache on the mesh."""
    made: tuple[Layer, ...] = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes(layout, model, mesh)
    )
    return made


def _entries(keys: Array, values: Array, layer: Layer) -> tuple[Array, Array | None]:
    """Keys and values [..., KV, hd] as a page holds them: [..., 2 KV, hd], and their scales [..., 2 KV] if int8."""
    both = jnp.stack([keys, values], axis=-2)  # [..., KV, 2, hd]
    both = both.reshape(*both.shape[:-3], -1, both.shape[-1])
    scales = None
    if layer.scales is not None:
        top = jnp.max(jnp.abs(both.astype(jnp.float32)), axis=-1)
        scales = jnp.where(top == 0, 1, top) / 127
        both = jnp.round(both.astype(jnp.float32) / scales[..., None])
    both = jnp.pad(both, ((0, 0),) * (both.ndim - 1) + ((0, layer.pages.shape[-1] - both.shape[-1]),))
    return both.astype(layer.pages.dtype), scales


def _per_shard(x: Array, shards: int) -> Array:
    return x.reshape(shards, -1, *x.shape[1:])


def write_token(layer: Layer, keys: Array, values: Array, page: Array, place: Array) -> Layer:
    """Put one token of each row into its page: keys and values [B, KV, hd], page and place int32 [B]."""
    shards = layer.pages.shape[0]
    entries, scales = _entries(keys, values, layer)
    at = _per_shard(page, shards), _per_shard(place, shards)

    def put(into: Array, page: Array, place: Array, new: Array) -> Array:
        return into.at[page, place].set(new)

    pages = jax.vmap(put)(layer.pages, *at, _per_shard(entries, shards))
    if scales is None:
        return Layer(pages, None)
    assert layer.scales is not None
    return Layer(pages, jax.vmap(put)(layer.scales, *at, _per_shard(scales, shards)))


def write_pages(layer: Layer, keys: Array, values: Array, page: Array) -> Layer:
    """Put whole prompts into pages: keys and values [R, T, KV, hd], page int32 [R, T / page size]."""
    shards, size = layer.pages.shape[0], layer.pages.shape[2]
    entries, scales = _entries(keys, values, layer)

    def put(into: Array, page: Array, new: Array) -> Array:
        return into.at[page].set(new)

    def pieces(x: Array) -> Array:  # [R, T, ...] -> [S, R / S * T / size, size, ...]
        return x.reshape(shards, -1, size, *x.shape[2:])

    at = page.reshape(shards, -1)
    pages = jax.vmap(put)(layer.pages, at, pieces(entries))
    if scales is None:
        return Layer(pages, None)
    assert layer.scales is not None
    return Layer(pages, jax.vmap(put)(layer.scales, at, pieces(scales)))


@partial(jax.jit, donate_argnames=("cache",))
def copy_pages(cache: tuple[Layer, ...], source: Array, target: Array) -> tuple[Layer, ...]:
    """Page source[s, i] of shard s to page target[s, i], in every layer; int32 [S, n]."""

    def copy(x: Array) -> Array:
        return jax.vmap(lambda pages, source, target: pages.at[target].set(pages[source]))(x, source, target)

    return jax.tree.map(copy, cache)


def gather(layer: Layer, table: Array, hd: int, dtype: str) -> Working:
    """The pages of each row in one piece: table int32 [B, W]."""
    shards, _, size, heads, _ = layer.pages.shape
    b, w = table.shape
    rows = _per_shard(table, shards)

    def pick(pages: Array, rows: Array) -> Array:
        return pages[rows]

    both = jax.vmap(pick)(layer.pages, rows)[..., :hd].astype(dtype)  # [S, B / S, W, size, 2 KV, hd]
    if layer.scales is not None:
        both = both * jax.vmap(pick)(layer.scales, rows)[..., None].astype(dtype)
    both = both.reshape(b, w * size, heads // 2, 2, hd).transpose(3, 0, 2, 1, 4)  # [2, B, KV, N, hd]
    return Working(both[0], both[1])


def decode_attention(
    layer: Layer,
    working: Working | None,
    q: Array,
    keys: Array,
    values: Array,
    table: Array,
    position: Array,
    live: Array,
    layout: Layout,
    scale: float,
    window: int | None,
    mesh: Mesh,
) -> tuple[Array, Layer, Working | None]:
    """Write one token a row and attend over what the row has: q [B, 1, H, hd], keys and values [B, 1, KV, hd].

    position int32 [B]: of the token; live bool [B]: other rows write into page 0 and their result means nothing.
    """
    size = layout.page
    page = jnp.take_along_axis(table, (position // size)[:, None], axis=1)[:, 0]
    layer = write_token(layer, keys[:, 0], values[:, 0], jnp.where(live, page, 0), position % size)
    if working is None:
        lengths = jnp.where(live, position + 1, 0)
        out = attend_paged(
            q, layer.pages, table, lengths, scale=scale, window=window, scales=layer.scales, kind=layout.kind, mesh=mesh
        )
        return out, layer, None
    if layer.scales is not None:  # what later blocks will read
        entries, scales = _entries(keys[:, 0], values[:, 0], layer)
        assert scales is not None
        both = entries.astype(q.dtype) * scales[..., None].astype(q.dtype)  # rounded as `gather` will
        both = both.reshape(*entries.shape[:-2], -1, 2, entries.shape[-1])
        keys, values = both[:, None, :, 0], both[:, None, :, 1]
    rows = jnp.arange(q.shape[0])
    working = Working(
        working.keys.at[rows, :, position].set(keys[:, 0]), working.values.at[rows, :, position].set(values[:, 0])
    )
    seen = jnp.where(live, position, -1)
    out = attend_decode(q, *working, seen, scale=scale, window=window, chunk=layout.chunk)
    return out, layer, working
