"""The update: one compiled program from packed rows to new weights.

A loop over micro-batches adds up gradients and token counts in float32 and divides once, so the result is the exact
token mean over micro-batches, devices and hosts. The number of micro-batches is an argument of the program, not part
of its shape: a step with fewer tokens costs less and compiles nothing. One optimizer step a batch, strictly on-policy
(as the reference effectively does, docs/differences.md): there are no mini-batches and no epochs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.config import Config
from azr_jax.dist.mesh import replicated, row_sharding, row_shards
from azr_jax.dist.sequence import token_layout
from azr_jax.learn.logprobs import chunk_tokens, next_token_logprobs
from azr_jax.learn.loss import Totals, gap_quantile, policy_loss
from azr_jax.learn.optimizer import learning_rate, make_optimizer
from azr_jax.learn.packing import PackedBatch
from azr_jax.learn.state import TrainState, param_shardings, state_shardings
from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Array, Attend, Params, Remat, forward, param_specs
from azr_jax.tasks.kinds import KINDS, ROLES

Batch = dict[str, Any]  # the arrays of a PackedBatch by name
Update = Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, float]]]


def micro_rows(config: Config, mesh: Mesh) -> int:
    """Rows of a micro-batch: `learn.rows`, rounded up to a multiple of the devices that share them."""
    shards = row_shards(mesh)
    return -(-config.learn.rows // shards) * shards


def row_logprobs(
    params: Params,
    model_config: ModelConfig,
    rows: Batch,
    temperature: float,
    mesh: Mesh,
    remat: Remat = "none",
    attend: Attend = attend,
    banned: Array | None = None,
) -> tuple[Array, Array]:
    """Log-probability of every token given its prefix, and the entropy it was drawn with: float32 [B, T] each.

    Aligned with tokens: position t is about token t. Position 0 of a segment has no prefix in it; there the values
    are meaningless. With a `loss_mask` in `rows`, both are computed where it is set and 0 elsewhere.
    """
    # Rows of the embedding are looked up whole: over a table that is also cut along D, the compiler would copy
    # activations to every device, forward and backward.
    whole_rows = NamedSharding(mesh, PartitionSpec(param_shardings(model_config, mesh)["embed"].spec[0], None))
    params = params | {"embed": lax.with_sharding_constraint(params["embed"], whole_rows)}
    hidden = forward(
        params,
        model_config,
        rows["tokens"],
        rows["positions"],
        rows["segments"],
        remat=remat,
        layout=token_layout(mesh, rows["tokens"].shape[1]),
        attend=attend,
    )
    targets = jnp.roll(rows["tokens"], -1, axis=1)
    wanted = jnp.roll(rows["loss_mask"], -1, axis=1) > 0 if "loss_mask" in rows else None
    at_once = chunk_tokens(model_config) * row_shards(mesh)
    logprobs, entropy = next_token_logprobs(params, model_config, hidden, targets, temperature, at_once, banned, wanted)
    return jnp.roll(logprobs, 1, axis=1), jnp.roll(entropy, 1, axis=1)


def summed_gradient(
    params: Params,
    batch: Batch,
    n_micro: Array,
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    reference: Params | None = None,
    attend: Attend = attend,
    banned: Array | None = None,
) -> tuple[Params, Array, Totals]:
    """Sums over the first n_micro micro-batches: float32 gradient of the loss numerator, that numerator, Totals.

    reference: frozen weights in the compute dtype, for the KL penalty.
    """
    layout = param_shardings(model_config, mesh)
    dtype = jnp.dtype(config.learn.dtype)
    compute = jax.tree.map(lambda x: x.astype(dtype), params)  # once a step; the master stays float32

    def score(weights: Params, rows: Batch, remat: Remat) -> tuple[Array, Array]:
        return row_logprobs(weights, model_config, rows, config.rollout.temperature, mesh, remat, attend, banned)

    def numerator(weights: Params, rows: Batch) -> tuple[Array, Totals]:
        logprobs, entropy = score(weights, rows, config.learn.remat)
        reference_logprobs = None
        if reference is not None:
            reference_logprobs, _ = score(reference, rows, "none")
        return policy_loss(
            logprobs,
            entropy,
            rows["old_logprobs"],
            rows["advantages"],
            rows["loss_mask"],
            rows["weights"],
            rows["group"],
            config.learn,
            reference_logprobs,
        )

    def add(index: Array, carry: tuple[Params, Array, Totals]) -> tuple[Params, Array, Totals]:
        gradient, loss, totals = carry
        rows = {name: lax.dynamic_index_in_dim(array, index, keepdims=False) for name, array in batch.items()}
        rows = lax.with_sharding_constraint(rows, row_sharding(mesh))
        (value, new), grads = jax.value_and_grad(numerator, has_aux=True)(compute, rows)
        gradient = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), gradient, grads)
        return lax.with_sharding_constraint(gradient, layout), loss + value, totals.merge(new)

    zero = lax.with_sharding_constraint(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params), layout)
    return lax.fori_loop(0, n_micro, add, (zero, jnp.zeros((), jnp.float32), Totals.zero()))


def make_update(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    reference: Params | None = None,
    attend: Attend = attend,
    banned: Array | None = None,
) -> Update:
    """The function (state, batch) -> (state, metrics). The state given in is donated: use only the one returned.

    reference: the initial weights in the compute dtype, where `learn.kl` asks for them. banned: bool [V], the tokens
    that the sampler never draws.

    metrics are floats named `learner/...` (docs/metrics.md). A gradient that is not finite leaves weights, moments and
    schedule as they were and is counted in `state.skipped`; a batch without a single token is skipped too.
    """
    optimizer = make_optimizer(config.learn, config.steps, param_specs(model_config))
    schedule = learning_rate(config.learn, config.steps)
    shardings = state_shardings(config, model_config, mesh)
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)
    whole = replicated(mesh)

    def update(
        state: TrainState,
        batch: Batch,
        n_micro: Array,
        denominator: Array,
        reference: Params | None,
        banned: Array | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        gradient, numerator, totals = summed_gradient(
            state.params, batch, n_micro, config, model_config, mesh, reference, attend, banned
        )
        gradient = jax.tree.map(lambda g: g / denominator, gradient)
        grad_norm = optax.tree.norm(gradient)
        healthy = jnp.isfinite(grad_norm) & (n_micro > 0)
        old_moments = jax.device_put(state.opt_state, on_device) if config.learn.offload else state.opt_state
        updates, opt_state = optimizer.update(gradient, old_moments, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, old)

        done = TrainState(
            params=keep(params, state.params),
            opt_state=keep(opt_state, old_moments),
            step=state.step + 1,
            skipped=state.skipped + jnp.where(healthy, 0, 1).astype(jnp.int32),
        )
        count = state.step - state.skipped  # updates applied so far, the optimizer's own count
        measured = {
            "loss": numerator / denominator,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(schedule(count), jnp.float32),
            "update_norm": jnp.where(healthy, optax.tree.norm(updates), 0.0),
            "param_norm": optax.tree.norm(done.params),
            "bf16_changed": _changed_share(done.params, state.params),
            "skipped": jnp.where(healthy, 0.0, 1.0),
        }
        return done, measured | _token_means(totals, config)

    compiled = jax.jit(update, donate_argnums=0, out_shardings=(shardings, whole))

    def run(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, float]]:
        counts = np.int32(batch.n_micro), np.float32(max(batch.denominator, 1e-6))
        state, metrics = compiled(state, place(batch, mesh), *counts, reference, banned)
        return state, {f"learner/{name}": float(value) for name, value in jax.device_get(metrics).items()}

    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def make_logprobs(
    config: Config, model_config: ModelConfig, mesh: Mesh, banned: Array | None = None
) -> Callable[[Params, PackedBatch], np.ndarray]:
    """The function (params, batch) -> float32 [M, rows, T]: log-probs of the batch's tokens under these weights.

    0 outside responses. In the learner's own precision and at the rollout temperature, so the difference to
    `batch.old_logprobs` is the mismatch between sampler and learner.
    """
    dtype = jnp.dtype(config.learn.dtype)

    @jax.jit
    def compute(params: Params, batch: Batch, n_micro: Array) -> Array:
        weights = jax.tree.map(lambda x: x.astype(dtype), params)

        def one(index: Array, out: Array) -> Array:
            rows = {name: lax.dynamic_index_in_dim(array, index, keepdims=False) for name, array in batch.items()}
            rows = lax.with_sharding_constraint(rows, row_sharding(mesh))
            logprobs, _ = row_logprobs(weights, model_config, rows, config.rollout.temperature, mesh, banned=banned)
            return lax.dynamic_update_index_in_dim(out, logprobs, index, axis=0)

        return lax.fori_loop(0, n_micro, one, jnp.zeros(batch["tokens"].shape, jnp.float32))

    return lambda params, batch: np.asarray(compute(params, place(batch, mesh), np.int32(batch.n_micro)))


def place(batch: PackedBatch, mesh: Mesh) -> Batch:
    """The arrays of a packed batch on the mesh, rows over (data, fsdp)."""
    scalars = ("n_micro", "denominator")
    arrays = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in scalars}
    where = row_sharding(mesh, leading=1)
    # Every host has the whole batch. `device_put` would make sure of that by sending all of it to all devices.
    return {name: jax.make_array_from_callback(x.shape, where, x.__getitem__) for name, x in arrays.items()}


def _changed_share(new: Params, old: Params) -> Array:
    """Share of the weights whose bfloat16 rounding, which is what a bfloat16 sampler sees, is another one."""
    changed = jax.tree.map(lambda a, b: jnp.sum(a.astype(jnp.bfloat16) != b.astype(jnp.bfloat16)), new, old)
    sizes = float(sum(x.size for x in jax.tree.leaves(new)))  # as an int it would overflow int32 from 2B weights on
    return sum(x.astype(jnp.float32) for x in jax.tree.leaves(changed)) / sizes


def _token_means(totals: Totals, config: Config) -> dict[str, Array]:
    """Averages over trained tokens; a role without tokens this step has entropy 0."""
    tokens = jnp.sum(totals.tokens)
    share = 1.0 / jnp.maximum(tokens, 1.0)
    by_role = (len(ROLES), len(KINDS))
    role_tokens = totals.tokens.reshape(by_role).sum(axis=1)  # [2]
    role_entropy = totals.entropy.reshape(by_role).sum(axis=1) / jnp.maximum(role_tokens, 1.0)
    optional = {}
    if config.learn.importance_cap > 0:
        optional["importance_ess"] = totals.ratio**2 * share / jnp.maximum(totals.ratio_squared, 1e-30)
        optional["importance_truncated"] = totals.truncated * share
    if config.learn.kl != "none":
        optional["reference_kl"] = totals.reference_kl * share
    return optional | {
        "tokens": tokens,
        "surrogate": totals.surrogate * share,
        "entropy": jnp.sum(totals.entropy) * share,
        **{f"entropy_{role.value}": role_entropy[index] for index, role in enumerate(ROLES)},
        "ratio_mean": totals.ratio * share,
        "ratio_max": totals.ratio_max,
        "clip_low": totals.clipped_low * share,
        "clip_high": totals.clipped_high * share,
        "logp_gap_mean": totals.gap * share,
        "logp_gap_p99": gap_quantile(totals.gap_levels, 0.99),
        "logp_gap_max": totals.gap_max,
        "kl": totals.k3 * share,
    }
