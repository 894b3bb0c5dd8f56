"""Tokens that devices share between products: values and gradients stay, places change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.dist.sequence import token_layout, token_sharding

MESH = MeshConfig(1, 2, 4)


def test_tokens_lie_over_tensor_where_it_divides_them():
    mesh = make_mesh(MESH)
    assert token_sharding(mesh, 24).spec == PartitionSpec(("data", "fsdp"), "tensor")
    assert token_sharding(mesh, 22).shard_shape((2, 22, 3)) == (1, 22, 3)
    assert token_layout(mesh, 24).shared and not token_layout(mesh, 22).shared
    assert not token_layout(make_mesh(MeshConfig(1, 8, 1)), 24).shared


@pytest.mark.parametrize("tokens", [24, 22])
def test_both_moves_are_the_identity_and_bring_gradients_back(tokens):
    mesh = make_mesh(MESH)
    layout = token_layout(mesh, tokens)
    x = np.arange(4 * tokens * 3, dtype=np.float32).reshape(4, tokens, 3)
    there, back = token_sharding(mesh, tokens), row_sharding(mesh)
    for move, source, target in ((layout.scatter, back, there), (layout.gather, there, back)):
        moved, pull = jax.jit(lambda x, move=move: jax.vjp(move, x))(jax.device_put(x, source))
        gradient = jax.jit(pull)(jax.device_put(jnp.asarray(2 * x), target))[0]
        assert moved.sharding.is_equivalent_to(target, 3)
        assert gradient.sharding.is_equivalent_to(source, 3)
        np.testing.assert_array_equal(moved, x)
        np.testing.assert_array_equal(gradient, 2 * x)
