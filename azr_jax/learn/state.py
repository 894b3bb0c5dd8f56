"""What the learner carries from step to step, and where each part of it lives on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from azr_jax.config import Config
from azr_jax.dist.mesh import replicated, sharding_for
from azr_jax.learn.optimizer import make_optimizer
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Array, Params, Spec, param_specs


class TrainState(NamedTuple):
    """Everything an update reads and writes.

    params:    float32 master weights, nested dict as declared by `param_specs`.
    opt_state: of the optimizer; its moments are laid out like the weights they belong to.
    step:      int32 scalar, updates attempted.
    skipped:   int32 scalar, updates refused because a gradient was not finite.
    """

    params: Params
    opt_state: Any
    step: Array
    skipped: Array


def param_shardings(model_config: ModelConfig, mesh: Mesh) -> Any:
    """Nested dict of NamedSharding, one for each weight."""
    return _for_each_weight(lambda spec: sharding_for(spec, mesh), model_config)


def state_shardings(config: Config, model_config: ModelConfig, mesh: Mesh) -> Any:
    """A TrainState of NamedSharding: moments follow their weights, scalars are replicated.

    With `learn.offload` moments lie in the host's pinned memory and visit the devices during an update.
    """
    optimizer = make_optimizer(config.learn, config.steps, param_specs(model_config))
    weights = _for_each_weight(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model_config)
    shardings, whole = param_shardings(model_config, mesh), replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding.with_memory_kind("pinned_host") if config.learn.offload else sharding,
        jax.eval_shape(optimizer.init, weights),
        shardings,
        transform_non_params=lambda _: whole,
    )
    parts: tuple[Any, ...] = (shardings, opt_state, whole, whole)
    return TrainState(*parts)


def init_state(params: Params, config: Config, model_config: ModelConfig, mesh: Mesh) -> TrainState:
    """A fresh state from weights of any floating dtype: float32 copies placed on the mesh, zero moments, step 0.

    `params` are given up: float32 ones that lie on the mesh already become the state's own, without a copy.
    """
    shardings = state_shardings(config, model_config, mesh)
    optimizer = make_optimizer(config.learn, config.steps, param_specs(model_config))

    def build(params: Params) -> TrainState:
        master = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(master, optimizer.init(master), zero, zero)

    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(jax.device_put(params, shardings.params))


def _for_each_weight(function: Callable[[Spec], Any], model_config: ModelConfig) -> Any:
    return jax.tree.map(function, param_specs(model_config), is_leaf=lambda x: isinstance(x, Spec))
