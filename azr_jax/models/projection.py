"""Products of activations and weights, with the gradient of a weight in the order XLA multiplies fastest on CPU.

JAX contracts that gradient as [O, I] and turns the result over, which XLA on CPU merges into one product of transposed
arrays, at half the speed of turning the activations first. On accelerators both orders are the same.
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
    return d_x, jnp.einsum("bti,bto->io", x, gradient)


_product.defvjp(_forward, _backward)
