"""AdamW against its formula, the schedules, and what is decayed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from azr_jax.config import LearnConfig
from azr_jax.learn.optimizer import decayed, learning_rate, make_optimizer
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Spec, param_specs

SPECS = {"matrix": Spec((2, 2), ("embed", "mlp"), "normal"), "gain": Spec((2,), (None,), "ones")}


def rates(config: LearnConfig, steps: int, n: int | None = None) -> list[float]:
    schedule = learning_rate(config, steps)
    return [float(schedule(jnp.int32(i))) for i in range(n or steps)]


def test_schedules() -> None:
    assert rates(LearnConfig(lr=0.5), 3) == [0.5] * 3
    linear = LearnConfig(lr=1.0, schedule="linear")
    np.testing.assert_allclose(rates(linear, 5, 7), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0], rtol=1e-6)
    cosine = LearnConfig(lr=1.0, schedule="cosine")
    np.testing.assert_allclose(rates(cosine, 3, 4), [1.0, 0.5, 0.0, 0.0], atol=1e-6)
    warm = LearnConfig(lr=1.0, schedule="linear", warmup=2)
    np.testing.assert_allclose(rates(warm, 5), [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates(LearnConfig(lr=1.0, warmup=4), 6), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rtol=1e-6)
    assert all(np.isfinite(rates(LearnConfig(schedule="cosine", warmup=3), 1, 6)))  # shorter than its warm-up


def test_matrices_are_decayed_and_nothing_else() -> None:
    mask = decayed(param_specs(ModelConfig(64, 32, 64, 2, 4, 2, 8, tie_word_embeddings=False)))
    assert {name for name, value in mask["blocks"].items() if value} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert mask["embed"] and mask["lm_head"] and not mask["final_norm"]


@pytest.mark.parametrize("grad_clip", [1e9, 0.5])
def test_two_steps_equal_the_formula(grad_clip: float) -> None:
    config = LearnConfig(lr=0.01, weight_decay=0.1, grad_clip=grad_clip, schedule="linear", warmup=2)
    optimizer = make_optimizer(config, 2, SPECS)
    rng = np.random.default_rng(0)
    weights = {"matrix": rng.normal(size=(2, 2)), "gain": rng.normal(size=2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    state = optimizer.init(params)
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, lr in ((1, 0.005), (2, 0.01)):
        grads = {name: rng.normal(size=w.shape) for name, w in weights.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, decay in (("matrix", 0.1), ("gain", 0.0)):
            g = grads[name] * min(1.0, grad_clip / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            weights[name] = weights[name] - lr * (step + decay * weights[name])
            np.testing.assert_allclose(params[name], weights[name], atol=1e-6)
