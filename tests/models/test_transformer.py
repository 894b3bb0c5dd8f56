"""The forward pass: who may look at whom, whatever the layout in rows and on devices. Numbers are test_parity.py's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.dist.sequence import token_layout
from azr_jax.learn.state import param_shardings
from azr_jax.models import transformer
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import (
    ONE_PLACE,
    Params,
    Transformer,
    forward,
    init_params,
    param_specs,
    prefill,
    unembed,
)

MODEL = ModelConfig(64, 32, 64, 2, 4, 2, 8)
MESHES = [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2), MeshConfig(8, 1, 1), MeshConfig(1, 2, 4)]


def noisy(config: ModelConfig, scale: float = 0.2) -> Params:
    """Random weights, biases and gains too, with activations of order 1."""
    keys = iter(jax.random.split(jax.random.key(1), 32))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), init_params(config, 0))


@cache
def params_of() -> Params:
    return noisy(MODEL)


@cache
def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eight rows of 24 columns: two or three sequences each, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 24)).astype(np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(8):
        first, second = sorted(rng.choice(np.arange(2, 22), 2, replace=False))
        for segment, (start, end) in enumerate([(0, first), (first, second), (second, 24 - row % 3)], start=1):
            positions[row, start:end], segments[row, start:end] = np.arange(end - start), segment
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


def logits(params: Params, tokens, positions, segments, **options) -> jax.Array:
    return unembed(params, MODEL, forward(params, MODEL, tokens, positions, segments, **options))


@cache
def compiled():
    return jax.jit(logits)


def expected() -> np.ndarray:
    return np.asarray(compiled()(params_of(), *batch()))


def test_a_token_sees_its_own_past_only():
    tokens, positions, segments = batch()
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % 64)
    same = np.asarray(compiled()(params_of(), changed, positions, segments)) == expected()
    later_in_segment = np.asarray((segments[0] == segments[0, 5]) & (jnp.arange(24) >= 5))
    assert (same[0].all(axis=-1) == ~later_in_segment).all()
    assert same[1:].all()


@pytest.mark.parametrize("mesh_config", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
@pytest.mark.parametrize("laid_out", [False, True])
def test_the_same_on_every_mesh(mesh_config, laid_out):
    mesh = make_mesh(mesh_config)
    params = jax.device_put(params_of(), param_shardings(MODEL, mesh))
    rows = jax.device_put(batch(), row_sharding(mesh))

    def run(params, *rows):
        return logits(params, *rows, layout=token_layout(mesh, 24) if laid_out else ONE_PLACE)

    assert len(params["blocks"]["gate"].sharding.device_set) == 8
    np.testing.assert_allclose(jax.jit(run)(params, *rows), expected(), atol=2e-5)


def test_a_scan_over_layers_is_the_unrolled_model(monkeypatch):
    monkeypatch.setattr(transformer, "UNROLL_UP_TO", 0)
    np.testing.assert_allclose(jax.jit(lambda *a: logits(*a))(params_of(), *batch()), expected(), atol=1e-5)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_neither_values_nor_gradients(remat):
    def loss(params, remat):
        return jnp.sum(jnp.tanh(logits(params, *batch(), remat=remat)))

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, saved = step(params_of(), "none"), step(params_of(), remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)


@pytest.mark.parametrize(("remat", "tokens"), [("none", 22), ("dots", 24), ("block", 22)])
def test_sharing_tokens_changes_no_gradient(remat, tokens):
    """Two rows a device; 24 tokens are divided among four devices, 22 are not."""
    mesh = make_mesh(MeshConfig(1, 2, 4))
    rows = tuple(x[:4, :tokens] for x in batch())

    def loss(params, rows, layout, remat):
        return jnp.sum(jnp.tanh(logits(params, *rows, layout=layout, remat=remat)))

    gradient = jax.jit(jax.grad(loss), static_argnums=(2, 3))
    plain = gradient(params_of(), rows, ONE_PLACE, "none")
    params = jax.device_put(params_of(), param_shardings(MODEL, mesh))
    shared = gradient(params, jax.device_put(rows, row_sharding(mesh)), token_layout(mesh, tokens), remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, shared)


def test_the_cache_holds_what_later_tokens_need():
    """Keys and values of a prefix do not depend on what follows it."""
    tokens, positions, segments = (x[:1] for x in batch())
    _, whole = prefill(params_of(), MODEL, tokens, positions, segments)
    _, part = prefill(params_of(), MODEL, tokens[:, :9], positions[:, :9], segments[:, :9])
    assert whole[0].shape == (2, 1, 24, 2, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, :, :9], b, atol=1e-5), whole, part)


def test_the_module_computes_what_the_functions_do():
    model = Transformer(MODEL, rngs=nnx.Rngs(params=3))
    want = compiled()(init_params(MODEL, 3), *batch())
    np.testing.assert_allclose(model(*batch()), want, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_those_declared(tied, bias):
    config = replace(MODEL, tie_word_embeddings=tied, attention_bias=bias)
    params, specs = init_params(config, 0), param_specs(config)
    flat = dict(jax.tree_util.tree_leaves_with_path(params))
    declared = dict(jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, transformer.Spec)))
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: spec.shape for path, spec in declared.items()}
    assert sum(leaf.size for leaf in flat.values()) == config.num_params
    assert all(leaf.dtype == jnp.float32 for leaf in flat.values())
    assert float(params["blocks"]["q"].std()) == pytest.approx(0.02, rel=0.1)
    assert all(np.all(params["blocks"][name] == 1) for name in ("attn_norm", "mlp_norm"))
    assert bias == ("q_bias" in params["blocks"]) and tied == ("lm_head" not in params)


def test_bfloat16_weights_give_float32_logits_close_to_the_exact_ones():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
    result = compiled()(half, *batch())
    exact = np.asarray(compiled()(jax.tree.map(lambda x: x.astype(jnp.float32), half), *batch()))
    assert result.dtype == jnp.float32
    real = np.asarray(batch()[2]) > 0
    assert np.abs(np.asarray(result) - exact)[real].mean() < 0.02 * exact.std()
