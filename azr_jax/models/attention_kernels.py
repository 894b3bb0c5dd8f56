"""Fused attention kernels behind `attend` and `attend_paged`: splash and ragged paged (TPU), cuDNN (GPU).

Each is JAX's own kernel; what stands here is the fitting: layouts, padding to blocks, scale, segments, the mesh.
Tests hold each to the XLA reference. Nothing here decides whether a kernel can run (attention_choice.py does).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, PartitionSpec

from azr_jax.models.attention import Visibility, attend

Array = jax.Array

#: Columns of a TPU vector register: rows of tokens and page heads come in multiples of it.
LANES = 128

#: Queries and keys of a splash block. Compiles for head_dim 64 to 256 on v5e and v6e.
SPLASH_BLOCK = 512

#: Cached tokens the ragged kernel fetches at once.
RAGGED_TOKENS = 512

#: On-chip memory the ragged kernel may use; v5e and v6e have 128 MiB.
RAGGED_VMEM = 64 * 2**20

#: Most segments in a row that go through cuDNN; its statistics take memory for each. Rows with more take XLA.
CUDNN_SEGMENTS = 64


def over_mesh(
    kernel: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    visibility: Visibility,
    mesh: Mesh | None,
) -> Array:
    """`kernel(q, k, v, visibility)` on each device's share: rows over (data, fsdp), heads over tensor.

    What does not divide is not split; key heads are repeated until they do, if query heads do. Also on one device, so
    that a kernel compiled ahead of time is compiled for the device of the mesh.
    """
    if mesh is None:
        return kernel(q, k, v, visibility)
    rows = ("data", "fsdp") if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    tensor = mesh.shape["tensor"]
    heads = None
    repeats = tensor // gcd(k.shape[2], tensor)
    if q.shape[2] % (k.shape[2] * repeats) == 0:
        heads = "tensor"
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    split, whole = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(split, split, split, whole), out_specs=split, check_vma=False)(
        q, k, v, visibility
    )


def splash(q: Array, k: Array, v: Array, visibility: Visibility, *, scale: float, window: int | None = None) -> Array:
    """TPU splash attention, with its backward pass. Scores, softmax and sums are float32.

    The scale goes into the queries, rounded once to their dtype.
    """
    b, t, h, hd = q.shape
    block = SPLASH_BLOCK if t > SPLASH_BLOCK else -(-t // LANES) * LANES
    length = -(-t // block) * block

    def fit(x: Array) -> Array:  # [B, T, heads, hd] -> [B, heads, length, hd]
        return jnp.pad(x, ((0, 0), (0, length - t), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    shape = (length, length)
    mask = splash_lib.CausalMask(shape) if window is None else splash_lib.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash_lib.make_splash_mha_single_device(
        splash_lib.MultiHeadMask([mask] * h),
        block_sizes=splash_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    segments = jnp.pad(visibility.q_segments, ((0, 0), (0, length - t)))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    out = jax.vmap(kernel)(fit(q), fit(k), fit(v), splash_lib.SegmentIds(segments, segments))
    # The kernel lets padding see padding.
    return jnp.where(_real(visibility), out.transpose(0, 2, 1, 3)[:, :t], 0)


def cudnn(q: Array, k: Array, v: Array, visibility: Visibility, *, scale: float) -> Array:
    """cuDNN attention of packed rows by segment offsets, with its backward pass; bfloat16, NVIDIA Hopper or later.

    The public `jax.nn.dot_product_attention` has lengths for one segment a row only, so this calls the function under
    it. Rows with more than CUDNN_SEGMENTS segments go through the reference, whole batches at a time.
    """
    function, causal = packed_cudnn()
    groups = q.shape[2] // k.shape[2]
    lengths, offsets = segment_table(visibility.q_segments, CUDNN_SEGMENTS)

    def fused(q: Array, k: Array, v: Array) -> Array:
        # What cuDNN leaves in padding, forward and backward, is not defined: it is cut off on both sides.
        q, k, v = (jnp.where(_real(visibility), x, 0) for x in (q, k, v))
        # JAX 0.10 places packed keys by the stride of queries, which is right for as many key as query heads only.
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        out = function(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=scale,
            mask_type=causal,
        )
        return jnp.where(_real(visibility), out, 0)

    def reference(q: Array, k: Array, v: Array) -> Array:
        return attend(q, k, v, visibility, scale=scale)

    few = jnp.max(jnp.sum(_starts(visibility.q_segments), axis=1)) <= CUDNN_SEGMENTS
    return lax.cond(few, fused, reference, q, k, v)


def packed_cudnn() -> tuple[Callable[..., Array], Any]:
    """JAX's cuDNN attention with segment offsets and its causal-with-lengths mask.

    Not public API: ImportError when this version of JAX has no such function.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if not {"q_offsets", "kv_offsets"} <= set(inspect.signature(dot_product_attention).parameters):
        raise ImportError("cuDNN attention without segment offsets")
    return dot_product_attention, MaskType.PADDING_CAUSAL


def segment_table(segments: Array, most: int) -> tuple[Array, Array]:
    """Lengths [B, most] and first columns [B, most + 1] of the segments of rows [B, T], -1 where there is none."""
    starts = _starts(segments)
    first = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=-1)[0])(starts).astype(jnp.int32)
    order = jnp.where(segments != 0, jnp.cumsum(starts, axis=1) - 1, most)  # [B, T], which segment of the row
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=most))(order).astype(jnp.int32)
    return jnp.where(lengths == 0, -1, lengths), first.at[:, most].set(-1)


def _starts(segments: Array) -> Array:
    """bool [B, T]: where a segment begins."""
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return (segments != 0) & (segments != before)


def _real(visibility: Visibility) -> Array:
    """bool [B, T, 1, 1]: tokens that are not padding."""
    return (visibility.q_segments != 0)[:, :, None, None]


def ragged_can(pages: Array) -> bool:
    """Whether the ragged kernel takes these pages: not int8, heads of 128 columns (narrower ones padded to it)."""
    return pages.shape[-1] == LANES and pages.dtype != jnp.int8


def ragged(
    q: Array,
    pages: Array,
    table: Array,
    lengths: Array,
    scale: float,
    window: int | None,
    mesh: Mesh | None,
) -> Array:
    """TPU ragged paged attention: `attend_paged` for pages of 128 columns.

    On a mesh shards of rows and pages lie over data, heads over tensor where they divide.
    """

    def kernel(q: Array, pages: Array, table: Array, lengths: Array) -> Array:
        b, t, h, hd = q.shape
        positions = lengths[:, None] - t + jnp.arange(t)  # [B, T]
        out = ragged_paged_attention(
            jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, LANES - hd))).reshape(b * t, h, LANES),
            pages[0],
            jnp.maximum(lengths, 1),  # the kernel waits forever for a row without tokens
            table,
            t * jnp.arange(b + 1, dtype=jnp.int32),
            jnp.full(1, b, jnp.int32),
            sm_scale=scale,
            sliding_window=window,
            num_kv_pages_per_block=min(table.shape[1], max(1, RAGGED_TOKENS // pages.shape[2])),
            num_queries_per_block=min(b * t, 8 if t == 1 else 32),
            vmem_limit_bytes=RAGGED_VMEM,
        )
        return jnp.where((positions >= 0)[:, :, None, None], out.reshape(b, t, h, LANES)[..., :hd], 0)

    if mesh is None:
        if pages.shape[0] != 1:
            raise ValueError(f"{pages.shape[0]} shards of pages need the mesh they lie on")
        return kernel(q, pages, table, lengths)
    heads = "tensor" if pages.shape[3] // 2 % mesh.shape["tensor"] == 0 else None
    rows, split = PartitionSpec("data"), PartitionSpec("data", None, heads)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(split, PartitionSpec("data", None, None, heads), rows, rows),
        out_specs=split,
        check_vma=False,
    )(q, pages, table, lengths)
