"""The sampler's copy of the weights: in its dtype, layer by layer, on the devices of this host alone.

The learner's weights are split over all hosts (fsdp); decoding from those would gather them for every token. Here each
host keeps all of them, split over its own devices by heads and columns, and nothing crosses hosts while it decodes.
Layers are separate arrays: a compiled loop that slices stacked ones copies the model first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from azr_jax.dist.mesh import AXES, sharding_for
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Params, Spec, param_specs


def decode_mesh(model: ModelConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh over one host's devices, of the sizes of `decode_sizes`."""
    grid = np.asarray(devices, dtype=object).reshape(tuple(decode_sizes(model, len(devices)).values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decode_sizes(model: ModelConfig, devices: int) -> dict[str, int]:
    """Size of each mesh axis over a host's devices: tensor as far as key heads divide, groups of those over data."""
    tensor = gcd(devices, model.num_kv_heads)
    return {"data": devices // tensor, "fsdp": 1, "tensor": tensor}


def copy_shardings(model: ModelConfig, mesh: Mesh) -> Params:
    """NamedSharding for each weight of the copy, in its shape: `blocks` is a tuple of layers."""

    def place(spec: Spec) -> NamedSharding:
        return sharding_for(spec, mesh)

    def is_spec(x: Any) -> bool:
        return isinstance(x, Spec)

    specs = param_specs(model)
    stacks = specs.pop("blocks").items()
    layer = {name: spec._replace(shape=spec.shape[1:], axes=spec.axes[1:]) for name, spec in stacks}
    placed: Params = jax.tree.map(place, specs, is_leaf=is_spec)
    return placed | {"blocks": (jax.tree.map(place, layer, is_leaf=is_spec),) * model.num_layers}


def copy_shapes(model: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The copy as ShapeDtypeStructs with shardings."""
    specs = param_specs(model)
    layers = specs.pop("blocks")
    shapes = {name: spec.shape for name, spec in specs.items()}
    blocks = ({name: spec.shape[1:] for name, spec in layers.items()},) * model.num_layers
    made: Params = jax.tree.map(
        lambda where, shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where),
        copy_shardings(model, mesh),
        shapes | {"blocks": blocks},
    )
    return made


def decode_copy(params: Params, model: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    """The learner's weights (`param_specs`: stacked layers, any mesh and dtype) as the sampler wants them.

    One layer at a time is cast and moved, so that little more than the copy is held on top of the learner's own.
    """
    shardings = copy_shardings(model, mesh)

    def move(x: jax.Array, where: NamedSharding) -> jax.Array:
        return _to_host_mesh(x.astype(dtype), where)

    blocks = tuple(
        {name: move(_layer(stack, i), shardings["blocks"][i][name]) for name, stack in params["blocks"].items()}
        for i in range(model.num_layers)
    )
    rest = {name: move(value, shardings[name]) for name, value in params.items() if name != "blocks"}
    return rest | {"blocks": blocks}


@jax.jit
def _layer(stack: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _to_host_mesh(x: jax.Array, where: NamedSharding) -> jax.Array:
    """An array of all hosts onto this host's mesh; every host gets the whole of it."""
    if jax.process_count() == 1:
        return jax.device_put(x, where)
    # All hosts together: as many copies of the host's mesh, side by side, each with the same values.
    local = where.mesh.devices
    index = {device: at for at, device in np.ndenumerate(local)}
    hosts = np.asarray(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)), dtype=object).reshape(
        jax.process_count(), *local.shape
    )
    assert set(hosts[jax.process_index()].flat) == set(index), "hosts have as many devices each"
    everywhere = Mesh(hosts, ("host", *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))
    copies = jax.device_put(x, NamedSharding(everywhere, where.spec))
    own = [shard.data for shard in copies.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, where, own)


def weights_bytes(model: ModelConfig, dtype: str) -> int:
    """What a decode step reads of a whole copy: all but an embedding that logits are not made from."""
    specs = param_specs(model)
    if not model.tie_word_embeddings:
        del specs["embed"]
    sizes = (int(np.prod(spec.shape)) for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, Spec)))
    return sum(sizes) * jnp.dtype(dtype).itemsize
