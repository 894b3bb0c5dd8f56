"""Products of activations and weights, whose gradient never transposes the larger of the two.

JAX contracts the gradient of a weight in one fixed order. Where that makes XLA transpose what is as wide as the
feed-forward layer, fused with the activation's derivative, a CPU spends more time on it than on the products. Here the
narrower operand is the one that is turned; on accelerators both orders are the same.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def project(x: Array, weight: Array) -> Array:
    """x [B, T, *I] times weight [*I, *O] -> [B, T, *O], in their dtype; I and O are any number of axes."""
    inner = x.shape[2:]
    outer = weight.shape[len(inner) :]
    y = _product(x.reshape(*x.shape[:2], -1), weight.reshape(math.prod(inner), -1))
    return y.reshape(*x.shape[:2], *outer)


@jax.custom_vjp
def _product(x: Array, weight: Array) -> Array:
    return x @ weight  # [B, T, I] [I, O]


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    d_x = jnp.einsum("bto,io->bti", gradient, weight)
    if x.shape[-1] <= gradient.shape[-1]:
        return d_x, jnp.einsum("bti,bto->io", x, gradient)
    return d_x, jnp.einsum("bto,bti->oi", gradient, x).T


_product.defvjp(_forward, _backward)
