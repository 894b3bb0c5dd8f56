"""The mesh (data x fsdp x tensor) and the one place that says which weight axis lies on which mesh axis.

`data` replicates weights, `fsdp` shards weights and rows, `tensor` shards heads, feed-forward columns, vocabulary and,
between the products of a block, tokens (sequence.py). The same code serves one device and many: an axis of size 1
shards nothing. Axes are of JAX's Auto type: the compiler places the collectives, a wrong rule costs speed and never
correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


class LogicalArray(Protocol):
    """What a sharding is made from: the shape of an array and a logical name (or None) for each of its axes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str | None, ...]: ...


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis. None: never sharded."""

    embed: str | None = "fsdp"
    vocab: str | None = "tensor"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    head_dim: str | None = None
    layers: str | None = None


#: How the learner lays out weights.
RULES = Rules()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the given sizes over `devices` (default: all of them). ConfigError as `mesh_sizes`."""
    found = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(found))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found)


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Size of each axis over so many devices; one that is 0 becomes "what the others leave".

    ConfigError: a negative size, two zeros, or sizes whose product is not the number of devices.
    """
    sizes: dict[str, int] = {axis: getattr(config, axis) for axis in AXES}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if min(sizes.values()) < 0:
        raise ConfigError(f"{text}: a mesh axis cannot be negative; use 0 for all devices the other axes leave")
    free = [axis for axis, size in sizes.items() if size == 0]
    if len(free) > 1:
        names = " or ".join(f"mesh.{axis}" for axis in free)
        raise ConfigError(f"{text}: only one mesh axis can be 0; give a size to {names}")
    fixed = int(np.prod([size for size in sizes.values() if size]))
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif free or fixed != devices:
        needed = "divide" if free else "equal"
        raise ConfigError(f"{text}: the sizes multiply to {fixed}, which must {needed} the {devices} devices there are")
    return sizes


def sharding_for(spec: LogicalArray, mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Where an array with these logical axes lives. A dimension its mesh axis does not divide is replicated.

    ValueError: a logical axis that `Rules` does not know.
    """
    used: set[str] = set()
    names: list[str | None] = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        if axis is not None and not hasattr(rules, axis):
            raise ValueError(f"logical axis {axis!r} of an array of shape {spec.shape} has no sharding rule")
        name = None if axis is None else getattr(rules, axis)
        if name is None or name in used or size % mesh.shape[name]:
            names.append(None)  # a mesh axis can shard one dimension of an array only
        else:
            used.add(name)
            names.append(name)
    return NamedSharding(mesh, PartitionSpec(*names))


def row_shards(mesh: Mesh) -> int:
    """Among how many groups of devices the rows of a batch are divided."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of an array [*leading, rows, ...]: rows over (data, fsdp), the rest replicated."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
