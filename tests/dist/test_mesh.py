"""The mesh and the sharding rules, on 8 fake CPU devices: real shards, clear errors, replication as the fallback."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import Rules, make_mesh, row_sharding, row_shards, sharding_for
from azr_jax.errors import ConfigError


@dataclass(frozen=True)
class Logical:
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def sizes(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    return tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))


def test_zero_takes_the_devices_the_other_axes_leave() -> None:
    assert len(jax.devices()) == 8, "tests run on 8 fake devices"
    assert sizes(make_mesh(MeshConfig(data=1, fsdp=0, tensor=1))) == (1, 8, 1)
    assert sizes(make_mesh(MeshConfig(data=2, fsdp=0, tensor=2))) == (2, 2, 2)
    assert sizes(make_mesh(MeshConfig(data=0, fsdp=1, tensor=4))) == (2, 1, 4)
    assert sizes(make_mesh(MeshConfig(), jax.devices()[:1])) == (1, 1, 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3, fsdp=0, tensor=1), ["mesh.data=3", "8 devices"]),
        (MeshConfig(data=2, fsdp=2, tensor=1), ["multiply to 4", "8 devices"]),
        (MeshConfig(data=0, fsdp=0, tensor=1), ["only one", "mesh.data", "mesh.fsdp"]),
        (MeshConfig(data=1, fsdp=-1, tensor=1), ["negative"]),
    ],
)
def test_impossible_sizes_are_config_errors(config: MeshConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mesh(config)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


def test_weights_are_really_sharded() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = sharding_for(Logical((3, 8, 4), ("layers", "embed", "mlp")), mesh)
    assert sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    array = jax.device_put(np.zeros((3, 8, 4), np.float32), sharding)
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 4, 2)}


def test_a_dimension_that_does_not_divide_is_replicated() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    sharding = sharding_for(Logical((8, 3, 16), ("embed", "kv_heads", None)), mesh)
    assert sharding.spec == PartitionSpec("fsdp", None, None)


def test_a_mesh_axis_shards_one_dimension_of_an_array() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    assert sharding_for(Logical((8, 8), ("mlp", "vocab")), mesh).spec == PartitionSpec("tensor", None)


def test_other_rules_can_be_given() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    weight = Logical((8, 8), ("embed", "mlp"))
    assert sharding_for(weight, mesh, Rules(embed=None)).spec == PartitionSpec(None, "tensor")


def test_an_unknown_logical_axis_is_an_error() -> None:
    with pytest.raises(ValueError, match="'experts'"):
        sharding_for(Logical((8,), ("experts",)), make_mesh(MeshConfig()))


def test_rows_are_divided_over_data_and_fsdp() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert row_shards(mesh) == 4
    rows = jax.device_put(np.zeros((3, 8, 5), np.int32), row_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3, 2, 5)}
