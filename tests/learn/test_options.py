"""The update's options: where and how precisely moments are kept, the penalty against the initial weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from azr_jax.config import Config, LearnConfig, MeshConfig
from azr_jax.learn.optimizer import make_optimizer, stochastic_bfloat16
from azr_jax.learn.state import TrainState, init_state
from azr_jax.learn.step import make_update
from tests.learn.test_optimizer import SPECS
from tests.learn.test_step import CONFIG, MODEL, ONE, mesh_of, packed, params_of

SHARDED = MeshConfig(1, 4, 2)


@cache
def updated(
    config: Config, mesh: MeshConfig = ONE, steps: int = 2, refer: bool = False
) -> tuple[TrainState, list[dict[str, float]]]:
    """State after `steps` updates on the same batch, metrics of each; `refer`: measured against the first weights."""
    state = init_state(jax.tree.map(jnp.copy, params_of()), config, MODEL, mesh_of(mesh))
    update = make_update(config, MODEL, mesh_of(mesh), jax.tree.map(jnp.copy, params_of()) if refer else None)
    history = []
    for _ in range(steps):
        state, metrics = update(state, packed(8))
        history.append(metrics)
    assert update.compiled._cache_size() == 1  # type: ignore[attr-defined]
    return state, history


def learning(**keys) -> Config:
    return replace(CONFIG, learn=replace(CONFIG.learn, **keys))


def test_offloaded_moments_live_on_the_host_and_change_nothing() -> None:
    plain, _ = updated(CONFIG, SHARDED)
    state, _ = updated(learning(offload=True), SHARDED)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((state.opt_state[1].mu, state.opt_state[1].nu))}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain.opt_state)


def test_bfloat16_moments_halve_the_bytes_and_train_nearly_alike() -> None:
    plain, _ = updated(CONFIG, SHARDED)
    state, _ = updated(learning(moments_dtype="bfloat16"), SHARDED)
    mu, nu = state.opt_state[1].mu, state.opt_state[1].nu
    assert {leaf.dtype for leaf in jax.tree.leaves((mu, nu))} == {jnp.dtype("bfloat16")}
    assert mu["blocks"]["up"].sharding == plain.opt_state[1].mu["blocks"]["up"].sharding
    start = params_of()
    wanted, got = (jax.tree.map(lambda a, b: np.asarray(a - b), s.params, start) for s in (plain, state))
    for want, have in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert np.abs(want - have).mean() < 0.02 * np.abs(want).mean()


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    exact = jnp.array([0.0, 1.0, -2.5])
    assert all((x == exact).all() for x in stochastic_bfloat16(exact, exact, jax.random.key(0)))
    value = jnp.full(20_000, 1.0 + 2**-10)  # an eighth of the way between two neighbours
    up = []
    for rounded in stochastic_bfloat16(value, value, jax.random.key(1)):
        assert set(np.asarray(rounded, np.float32).tolist()) == {1.0, 1.0 + 2**-7}
        up.append(np.asarray(rounded > 1))
        assert up[-1].mean() == pytest.approx(1 / 8, abs=0.02)
    assert (up[0] & up[1]).mean() == pytest.approx(1 / 64, abs=0.01)  # the two are rounded independently


def test_a_bfloat16_second_moment_follows_small_gradients() -> None:
    """With plain rounding it would stay where the first large gradient put it: 0.1 % of it is below a rounding step."""
    optimizer = make_optimizer(LearnConfig(moments_dtype="bfloat16", grad_clip=1e9), 1, SPECS)
    params = {"matrix": jnp.zeros((2, 2)), "gain": jnp.zeros(2)}
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    _, state = step(jax.tree.map(jnp.ones_like, params), state, params)
    first = np.asarray(state[1].nu["matrix"], np.float32)
    for _ in range(700):
        _, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
    left = np.asarray(state[1].nu["matrix"], np.float32) / first
    assert left.mean() == pytest.approx(0.999**700, abs=0.15)


def test_the_kl_penalty_holds_the_weights_back() -> None:
    """At the reference itself it is nothing; moved away, it is measured and pulls back."""
    _, free = updated(learning(kl="k3", kl_coef=0.0, lr=1e-2), ONE, 6, refer=True)
    _, held = updated(learning(kl="k3", kl_coef=5.0, lr=1e-2), ONE, 6, refer=True)
    assert free[0]["learner/reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < held[-1]["learner/reference_kl"] < 0.8 * free[-1]["learner/reference_kl"]
    _, plain = updated(CONFIG, SHARDED)
    assert "learner/reference_kl" not in plain[0]
    assert free[0]["learner/grad_norm"] == pytest.approx(plain[0]["learner/grad_norm"], rel=1e-5)


def test_importance_metrics_appear_only_where_it_is_on() -> None:
    _, plain = updated(CONFIG, SHARDED)
    _, capped = updated(learning(importance_cap=1.1), ONE, 1)
    assert not [name for name in plain[0] if "importance" in name]
    assert 0.5 < capped[0]["learner/importance_ess"] <= 1.0
    assert 0.0 < capped[0]["learner/importance_truncated"] < 1.0


def test_how_many_bfloat16_weights_an_update_changes() -> None:
    _, small = updated(learning(lr=1e-7), ONE, 1)
    _, large = updated(CONFIG, SHARDED)
    assert 0.0 <= small[0]["learner/bf16_changed"] < 0.05 < 0.3 < large[0]["learner/bf16_changed"] <= 1.0


def test_adam_without_options_is_optax_adam() -> None:
    optimizer = make_optimizer(LearnConfig(), 1, SPECS)
    state = optimizer.init({"matrix": jnp.zeros((2, 2)), "gain": jnp.zeros(2)})
    assert isinstance(state[1], optax.ScaleByAdamState) and state[1].mu["gain"].dtype == jnp.float32
