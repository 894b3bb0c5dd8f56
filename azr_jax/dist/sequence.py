"""Sequence parallelism: devices that share a row's heads and hidden units also share its tokens in between.

The products of a block are cut along `tensor` and read every token of a row. Around them, in norms and residuals, a
token is on its own, so each device keeps its share of the tokens only: what the backward pass keeps of a block, and
most of what it has at once, is divided by `tensor`. As many bytes travel as before, for the sum over devices that ends
a product is a reduce-scatter followed by an all-gather (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.dist.mesh import row_sharding
from azr_jax.models.transformer import TokenLayout


def token_sharding(mesh: Mesh, tokens: int) -> NamedSharding:
    """Sharding of activations [rows, tokens, D] between products. Tokens that `tensor` does not divide stay whole."""
    axis = None if tokens % mesh.shape["tensor"] else "tensor"
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), axis))


def token_layout(mesh: Mesh, tokens: int) -> TokenLayout:
    """How `forward` lays out activations of rows of so many tokens on a mesh."""
    whole, shared = row_sharding(mesh), token_sharding(mesh, tokens)
    return TokenLayout(gather=_moved(shared, whole), scatter=_moved(whole, shared))


def _moved(source: NamedSharding, target: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """The identity, which lays out its result as `target` and the gradient of its argument as `source`.

    The transpose of a sharding constraint puts the gradient where the value was; here it has to go back.
    """

    @jax.custom_vjp
    def move(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, target)

    def back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (lax.with_sharding_constraint(gradient, source),)

    move.defvjp(lambda x: (move(x), None), back)
    return move
