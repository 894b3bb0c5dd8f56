"""Chunked log-probs and entropy: equal to the textbook, whatever the chunk; no [B, T, V] in the compiled program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.learn.logprobs import next_token_logprobs
from azr_jax.models.config import ModelConfig

B, T, D, V = 3, 10, 8, 37
TIED = ModelConfig(V, D, 16, 1, 2, 1, 4)
UNTIED = ModelConfig(V, D, 16, 1, 2, 1, 4, tie_word_embeddings=False)


def inputs(seed: int = 0) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"embed": jax.random.normal(keys[0], (V, D)), "lm_head": jax.random.normal(keys[1], (D, V))}
    return params, jax.random.normal(keys[2], (B, T, D)), jax.random.randint(keys[3], (B, T), 0, V)


@pytest.mark.parametrize(("config", "temperature"), [(TIED, 0.7), (UNTIED, 1.0)], ids=["tied", "untied"])
@pytest.mark.parametrize("tokens", [1, 3 * B, B * T])  # one column, a chunk that does not divide T, all
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_equals_log_softmax(config: ModelConfig, temperature: float, tokens: int, some: bool) -> None:
    params, hidden, targets = inputs()
    # rows in which none, a few and most are wanted
    wanted = jnp.arange(B)[:, None] * 4 > jnp.arange(T) * 7 % T if some else jnp.ones((B, T), bool)
    assert not some or (not wanted[0].any() and 1 < wanted[1].sum() < wanted[2].sum() < T)

    def chunked(params, hidden):
        only = wanted if some else None
        return next_token_logprobs(params, config, hidden, targets, temperature, tokens, wanted=only)

    def plain(params, hidden):
        head = params["embed"].T if config.tie_word_embeddings else params["lm_head"]
        logp = jax.nn.log_softmax(hidden @ head / temperature, axis=-1)
        both = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)
        return tuple(jnp.where(wanted, x, 0.0) for x in both)

    def scalar(f):
        return lambda *args: sum(jnp.sum(jnp.sin(x)) for x in f(*args))

    for got, want in zip(jax.jit(chunked)(params, hidden), jax.jit(plain)(params, hidden), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    got, want = (jax.jit(jax.grad(scalar(f), argnums=(0, 1)))(params, hidden) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_uniform_logits_have_entropy_log_v() -> None:
    params, hidden, targets = inputs()
    logprob, entropy = next_token_logprobs(params, TIED, jnp.zeros_like(hidden), targets, 1.0)
    np.testing.assert_allclose(entropy, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(logprob, -np.log(V), rtol=1e-6)


def test_huge_logits_stay_finite_and_entropy_is_not_negative() -> None:
    params, hidden, targets = inputs()
    logprob, entropy = next_token_logprobs(params, TIED, 1e4 * hidden, targets, 1.0)
    assert np.isfinite(logprob).all() and np.isfinite(entropy).all() and (np.asarray(entropy) >= 0).all()


def test_entropy_gradient_by_finite_differences_on_five_tokens() -> None:
    config = ModelConfig(5, 5, 8, 1, 1, 1, 4)
    params = {"embed": jnp.eye(5)}  # hidden states are the logits
    targets = jnp.zeros((1, 1), jnp.int32)
    logits = np.array([0.3, -1.2, 0.9, 2.0, -0.4])

    @jax.jit
    def entropy(x):
        return next_token_logprobs(params, config, jnp.asarray(x, jnp.float32)[None, None], targets, 0.7)[1][0, 0]

    def exact(x):
        p = np.exp(x / 0.7) / np.exp(x / 0.7).sum()
        return -(p * np.log(p)).sum()

    step = 1e-5
    want = [(exact(logits + step * e) - exact(logits - step * e)) / (2 * step) for e in np.eye(5)]
    assert float(entropy(logits)) == pytest.approx(exact(logits), abs=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(entropy))(logits.astype(np.float32)), want, atol=1e-5)


def test_no_full_logits_in_the_compiled_gradient() -> None:
    params, hidden, targets = inputs()

    def largest(tokens: int) -> int:
        """Elements of the largest array of the compiled program that has a vocabulary axis and a token axis."""

        def loss(params, hidden):
            logprob, entropy = next_token_logprobs(params, TIED, hidden, targets, 1.0, tokens)
            return jnp.sum(logprob) + jnp.sum(entropy)

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden).compile().as_text()
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
        return max(int(np.prod(s)) for s in shapes if V in s and D not in s)

    assert largest(B * T) >= B * T * V  # the detector sees full logits where they are allowed
    assert largest(2 * B) == 2 * B * V
