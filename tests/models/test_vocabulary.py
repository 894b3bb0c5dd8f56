"""The look over the vocabulary: planted rows are found, trained ones are not, on any mesh; sizes are checked."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import UserError
from azr_jax.learn.state import param_shardings
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import init_params
from azr_jax.models.vocabulary import audit, ban, check_sizes, untrained_rows

TIED = ModelConfig(304, 32, 64, 2, 4, 2, 8, tie_word_embeddings=True)
UNTIED = replace(TIED, tie_word_embeddings=False)
ONE = MeshConfig(1, 1, 1)
NAMED = {"<|endoftext|>": 290, "<think>": 291, "</think>": 292}
EOS = frozenset({290})


def tokenizer(size: int = 300, added: dict[str, int] = NAMED) -> SimpleNamespace:
    """As much of a tokenizer as the audit looks at; ids from `size` on are padding rows."""
    words = {f"w{i}": i for i in range(size) if i not in added.values()}
    return SimpleNamespace(
        ids=words | added, added=added, control={"<|endoftext|>": 290}, eos_ids=EOS, prefix=(), vocab_size=size
    )


def trained(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Embeddings of different lengths and directions."""
    rng = np.random.default_rng(seed)

    def rows() -> np.ndarray:
        lengths = rng.uniform(0.3, 3.0, (config.vocab_size, 1))
        return (lengths * rng.normal(size=(config.vocab_size, config.hidden_size))).astype(np.float32)

    params = {"embed": rows()}
    return params if config.tie_word_embeddings else params | {"lm_head": rows().T}


def found(params: dict, config: ModelConfig = TIED, mesh: MeshConfig = ONE) -> set[int]:
    grid = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    layout = param_shardings(config, grid)
    placed = {name: jax.device_put(jnp.asarray(w), layout[name]) for name, w in params.items()}
    return set(np.flatnonzero(untrained_rows(placed, config, tokenizer(), grid)).tolist())


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_trained_rows_are_left_alone(config) -> None:
    """Padding rows that are random vectors say nothing about others."""
    assert found(trained(config), config) == set()
    assert found({k: np.asarray(v) for k, v in init_params(config, 0).items() if k in ("embed", "lm_head")}, config) \
        == set()  # fmt: skip


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 8, 1)], ids=str)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_planted_rows_are_found(config, mesh) -> None:
    params = trained(config)
    params["embed"][291] = 1e-4 * params["embed"][5]  # nearly nothing
    params["embed"][[17, 60]] = params["embed"][80]  # alike
    expected = {291, 17, 60, 80}
    if not config.tie_word_embeddings:
        params["lm_head"][:, 292] = 0.0
        expected |= {292}
    assert found(params, config, mesh) == expected


def test_rows_like_the_padding_rows_are_found() -> None:
    """What the softmax leaves of rows that are never a target: one direction, with a little of each row's own."""
    rng = np.random.default_rng(3)
    params = trained(TIED)
    drift = rng.normal(size=32)
    for row in (*range(300, 304), 291, 292):
        params["embed"][row] = drift + 0.1 * rng.normal(size=32)
    # The least aligned padding row sets the limit, so that a tag is found is nearly certain, not certain.
    params["embed"][300] = drift + 0.4 * np.linalg.norm(drift) * np.eye(32)[0]
    assert found(params) == {300, 301, 302, 303, 291, 292}


def test_rows_of_an_enlarged_vocabulary_are_found() -> None:
    """transformers' `resize_token_embeddings` draws new rows around the mean, all but equal."""
    rng = np.random.default_rng(3)
    params = trained(TIED)
    params["embed"][[291, 292]] = params["embed"].mean(axis=0) + 1e-6 * rng.normal(size=(2, 32))
    assert found(params) == {291, 292}


def test_bfloat16_rows() -> None:
    params = {name: jnp.asarray(w, jnp.bfloat16) for name, w in trained(TIED).items()}
    params["embed"] = params["embed"].at[7].set(params["embed"][9])
    assert found(params) == {7, 9}


def looked_over(params: dict, caplog, ban_untrained: bool) -> tuple[set[int] | None, str]:  # noqa: ANN001
    caplog.set_level(logging.WARNING)
    placed = {name: jnp.asarray(w) for name, w in params.items()}
    banned = audit(placed, TIED, tokenizer(), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), ban_untrained)
    return (None if banned is None else set(np.flatnonzero(np.asarray(banned)).tolist())), caplog.text


def test_named_tokens_are_named_and_nothing_is_banned_unasked(caplog) -> None:
    params = trained(TIED)
    params["embed"][[290, 291, 5]] = 0.0
    banned, text = looked_over(params, caplog, False)
    assert banned is None
    assert "3 of 300 tokens have rows that look untrained, among them <think>, <|endoftext|>" in text
    assert "rollout.ban_untrained_tokens=true" in text


def test_a_healthy_vocabulary_is_passed_over_in_silence(caplog) -> None:
    assert looked_over(trained(TIED), caplog, False) == (None, "")


def test_banned_are_untrained_and_nameless_rows_but_no_end_of_sequence(caplog) -> None:
    params = trained(TIED)
    params["embed"][[290, 291, 5]] = 0.0
    assert looked_over(params, caplog, True)[0] == {291, 5, 300, 301, 302, 303}


def test_a_ban_of_most_tokens_is_refused(caplog) -> None:
    params = trained(TIED)
    params["embed"][:200] = params["embed"][0]
    with pytest.raises(UserError, match="200 of 300 tokens look untrained"):
        looked_over(params, caplog, True)


def test_banned_logits_have_probability_zero_and_a_finite_gradient() -> None:
    logits, banned = jnp.array([1.0, 9.0, 2.0]), jnp.array([False, True, False])

    def entropy(x: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(ban(x, banned))
        return -jnp.sum(jnp.exp(logp) * logp)

    np.testing.assert_allclose(jax.nn.softmax(ban(logits, banned)), [1 / (1 + np.e), 0, np.e / (1 + np.e)], rtol=1e-6)
    value, gradient = jax.value_and_grad(entropy)(logits)
    np.testing.assert_allclose(value, -sum(p * np.log(p) for p in (1 / (1 + np.e), np.e / (1 + np.e))), rtol=1e-6)
    assert np.isfinite(gradient).all() and gradient[1] == 0.0


def test_more_rows_than_tokens_are_usual() -> None:
    check_sizes(tokenizer(size=300), TIED)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="400 tokens, the model embeddings for 304 .*w304, .* and 86 more.*same model"):
        check_sizes(tokenizer(size=400), TIED)


def test_an_added_token_without_a_row_is_reported(caplog) -> None:
    check_sizes(tokenizer(added=NAMED | {"<image>": 304}), TIED)
    assert "no embedding for <image>" in caplog.text
    with pytest.raises(UserError, match="<end>"):
        check_sizes(SimpleNamespace(**vars(tokenizer(added=NAMED | {"<end>": 304})) | {"eos_ids": {304}}), TIED)
