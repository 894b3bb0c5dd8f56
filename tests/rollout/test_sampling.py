"""`sample`, one token of each row: the distribution, its log-probabilities, the limits of temperature."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.rollout.decode import sample
from azr_jax.rollout.request import request_key

VOCAB = 16
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)
DRAWS = 20_000


@cache
def keys() -> np.ndarray:
    return np.array([request_key(0, "draw", i) for i in range(DRAWS)], np.uint32)


def draw(temperature: float, position: int = 0) -> tuple[np.ndarray, np.ndarray]:
    logits = jnp.broadcast_to(LOGITS, (DRAWS, VOCAB))
    drawn = jax.jit(sample)(logits, keys(), jnp.int32(position), jnp.full(DRAWS, temperature, jnp.float32))
    return np.asarray(drawn[0]), np.asarray(drawn[1])


def log_softmax(temperature: float) -> np.ndarray:
    scaled = LOGITS.astype(np.float64) / temperature
    return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()


def excess(counts: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square of counts in standard deviations above its mean; rare tokens share a bin."""
    expected = probability * counts.sum()
    rare = expected < 10
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return (chi2 - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("position", [0, 5])
def test_frequencies_are_the_softmax_probabilities(temperature, position):
    tokens, logprobs = draw(temperature, position)
    want = log_softmax(temperature)
    np.testing.assert_allclose(logprobs, want[tokens], atol=1e-5)
    assert excess(np.bincount(tokens, minlength=VOCAB), np.exp(want)) < 4
    other = np.exp(log_softmax(1.15 * temperature))
    assert excess(np.bincount(tokens, minlength=VOCAB), other) > 10, "the test could not tell"


def test_positions_are_independent():
    first, second = draw(1.0, 0)[0], draw(1.0, 1)[0]
    joint = np.bincount(first * VOCAB + second, minlength=VOCAB**2)
    p = np.exp(log_softmax(1.0))
    assert excess(joint, np.outer(p, p).reshape(-1)) < 4


def test_zero_is_greedy_and_reports_temperature_one():
    tokens, logprobs = draw(0.0)
    assert set(tokens) == {LOGITS.argmax()}
    np.testing.assert_allclose(logprobs, log_softmax(1.0).max(), atol=1e-5)


def test_near_zero_is_greedy_with_certainty():
    tokens, logprobs = draw(1e-4)
    assert set(tokens) == {LOGITS.argmax()}
    np.testing.assert_allclose(logprobs, 0.0, atol=1e-5)


def test_very_hot_is_uniform():
    tokens, logprobs = draw(1e6)
    np.testing.assert_allclose(logprobs, -np.log(VOCAB), atol=1e-4)
    assert excess(np.bincount(tokens, minlength=VOCAB), np.full(VOCAB, 1 / VOCAB)) < 4


def test_keys_are_hashes_of_identities():
    identities = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "a"), (0, "a", "1"), (0, 1, "a"), (0, "a1")]
    assert len({request_key(*identity) for identity in identities}) == len(identities)
    assert request_key(3, "step", 7) == request_key(3, "step", 7)
    assert all(0 <= half < 2**32 for identity in identities for half in request_key(*identity))
