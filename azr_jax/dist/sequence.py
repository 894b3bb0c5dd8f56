"""Sequence parallelism: devices that share a row's heads and hidden units also share its tokens in between.

The products of a block are cut along `tensor` and read every token of a row. Around them, in norms and residuals, a
token is on its own, so each device has its share of the tokens only. That divides the inputs of blocks, which are what
`learn.remat: block` keeps for the backward pass (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

It trades memory for traffic where the compiler ends a product with an all-reduce and throws the other shares away,
as libtpu 0.0.42 does with small products; with large ones it scatters sums while it still multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.dist.mesh import row_sharding
from azr_jax.models.transformer import TokenLayout


def token_sharding(mesh: Mesh, tokens: int) -> NamedSharding:
    """Sharding of activations [rows, tokens, D] between products. Tokens that `tensor` does not divide stay whole."""
    shares = mesh.shape["tensor"]
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor" if shares > 1 and tokens % shares == 0 else None))


def token_layout(mesh: Mesh, tokens: int) -> TokenLayout:
    """How `forward` lays out activations of rows of so many tokens on a mesh."""
    whole, shared = row_sharding(mesh), token_sharding(mesh, tokens)
    gather = _moved(shared, whole)
    return TokenLayout(
        whole=partial(lax.with_sharding_constraint, shardings=whole),
        # Held in place first: the compiler would gather before the cast that ends a norm, twice the bytes.
        gather=lambda x: gather(lax.with_sharding_constraint(x, shared)),
        scatter=_moved(whole, shared),
        shared=shared.spec[1] is not None,
    )


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
