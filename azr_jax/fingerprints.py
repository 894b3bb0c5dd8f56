"""What a tree of arrays is, in a few numbers: names, shapes, dtypes, and a fingerprint of each array's content.

Computed where the arrays are, and the same on any mesh, so that a checkpoint can be checked after it was read back onto
other devices. Not a cryptographic hash: it finds damage, not forgery.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


@jax.jit
def _leaf_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """One uint32 an array: the sum of its bit patterns, each times an odd number of its position, modulo 2^32.

    Integer addition is associative, so the result does not depend on how the array is laid out over devices; an odd
    factor makes every changed element, and nearly every exchange of two, change the sum.
    """
    sums = []
    for leaf in leaves:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            position = position * jnp.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        # Spread positions over the word, or exchanging neighbours would shift the sum by a small multiple only.
        factor = (position * jnp.uint32(2654435761)) << 1 | jnp.uint32(1)  # Knuth's multiplicative hash
        sums.append(jnp.sum(bits * factor, dtype=jnp.uint32))
    return sums


def fingerprints(state: Any) -> list[int]:
    """Of every leaf, in tree order. Leaves on different sets of devices cannot share one compiled program.

    What lies in host memory (offloaded moments) visits the devices one array after the other.
    """
    leaves = jax.tree.leaves(state)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        away = leaf.sharding.memory_kind == "pinned_host"
        groups.setdefault(index if away else frozenset(leaf.sharding.device_set), []).append(index)
    sums = [0] * len(leaves)
    for key, indices in groups.items():
        group = [leaves[index] for index in indices]
        if isinstance(key, int):
            group = [jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) for leaf in group]
        values = jax.device_get(_leaf_sums(group))
        for index, value in zip(indices, values, strict=True):
            sums[index] = int(value)
    return sums


def describe(state: Any, fingerprints: list[int] | None = None) -> dict[str, list[Any]]:
    """{name of the leaf: [shape, dtype, fingerprint]}, as it looks after a trip through JSON."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    marks: list[int | None] = list(fingerprints) if fingerprints is not None else [None] * len(paths)
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype), mark]
        for (path, leaf), mark in zip(paths, marks, strict=True)
    }
