"""AdamW on float32 master weights, with a global-norm clip and a schedule.

The master is float32 whatever the compute dtype: at the reference's learning rate of 1e-6 most updates would round away
in bfloat16. Moments may be bfloat16: rounded at random, up or down in proportion, they are right on average, where
plain rounding would freeze the second moment (it moves by 0.1 % a step, bfloat16 steps are 0.4 %).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from azr_jax.config import LearnConfig
from azr_jax.models.transformer import Spec


def learning_rate(config: LearnConfig, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: `warmup` linear steps up to lr, then the schedule down to 0.

    The last of `steps` updates has that final rate; later ones keep it.
    """
    body = _decay(config, max(steps - 1 - config.warmup, 1))
    if config.warmup == 0:
        return body
    # Update 0 already moves: the ramp is lr / warmup, 2 lr / warmup, ..., lr.
    ramp = optax.linear_schedule(config.lr / config.warmup, config.lr, max(config.warmup - 1, 1))
    return optax.join_schedules([ramp, body], [config.warmup])


def _decay(config: LearnConfig, updates: int) -> optax.Schedule:
    """From lr at update 0 to 0 after `updates` more."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.lr)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, updates)
    linear = optax.linear_schedule(config.lr, 0.0, updates)
    return lambda count: jnp.maximum(linear(count), 0.0)  # rounding must not carry it below


def decayed(specs: Any) -> Any:
    """Tree of bool: which weights are decayed. Matrices are; gains and biases are not."""
    return jax.tree.map(lambda spec: spec.init == "normal", specs, is_leaf=lambda x: isinstance(x, Spec))


def make_optimizer(config: LearnConfig, steps: int, specs: Any) -> optax.GradientTransformation:
    """The chain clip -> Adam -> decoupled weight decay -> learning rate, for weights declared by `specs`."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed(specs)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def scale_by_adam(config: LearnConfig) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments kept in `moments_dtype` between steps; arithmetic is float32."""
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    if config.moments_dtype == "float32":
        return adam

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(mu=_cast(state.mu, jnp.bfloat16), nu=_cast(state.nu, jnp.bfloat16))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        wide = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        updates, new = adam.update(gradient, wide, params)
        key = jax.random.fold_in(jax.random.key(0), new.count)
        mu, nu = stochastic_bfloat16(new.mu, new.nu, key)
        return updates, new._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def stochastic_bfloat16(first: Any, second: Any, key: jax.Array) -> tuple[Any, Any]:
    """Two trees of finite float32 arrays of the same shapes, rounded to a neighbour in bfloat16.

    The probability is what makes the mean exact. An element takes 16 random bits, so one draw of 32 serves both trees.
    """

    def rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

    def both(index: int, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.bits(jax.random.fold_in(key, index), a.shape, jnp.uint32)
        return rounded(a, noise & 0xFFFF), rounded(b, noise >> 16)

    leaves, structure = jax.tree.flatten(first)
    pairs = [both(i, a, b) for i, (a, b) in enumerate(zip(leaves, jax.tree.leaves(second), strict=True))]
    firsts, seconds = zip(*pairs)
    return jax.tree.unflatten(structure, firsts), jax.tree.unflatten(structure, seconds)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
