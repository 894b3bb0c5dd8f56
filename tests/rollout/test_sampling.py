"""`sample`, one token of each row: the distribution, its log-probabilities, the limits of temperature and rounding."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.rollout import sampling
from azr_jax.rollout.request import request_key
from azr_jax.rollout.sampling import GROUP, sample, uniform

VOCAB = 16
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)
DRAWS = 20_000
BELOW_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1


@cache
def keys() -> np.ndarray:
    return np.array([request_key(0, "draw", i) for i in range(DRAWS)], np.uint32)


compiled = jax.jit(sample)


def draw(temperature: float, position: int = 0, row: np.ndarray = LOGITS) -> tuple[np.ndarray, np.ndarray]:
    logits = jnp.broadcast_to(row, (DRAWS, len(row)))
    at, warm = np.full(DRAWS, position, np.int32), np.full(DRAWS, temperature, np.float32)
    tokens, logprobs = compiled(logits, keys(), at, warm)
    return np.asarray(tokens), np.asarray(logprobs)


def log_softmax(temperature: float, row: np.ndarray = LOGITS) -> np.ndarray:
    scaled = row.astype(np.float64) / temperature
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
def test_frequencies_are_the_softmax_probabilities(temperature: float, position: int) -> None:
    tokens, logprobs = draw(temperature, position)
    want = log_softmax(temperature)
    np.testing.assert_allclose(logprobs, want[tokens], atol=1e-6)
    assert excess(np.bincount(tokens, minlength=VOCAB), np.exp(want)) < 4
    other = np.exp(log_softmax(1.15 * temperature))
    assert excess(np.bincount(tokens, minlength=VOCAB), other) > 10, "the test could not tell"


@pytest.mark.parametrize("v", [1, GROUP, GROUP + 1, 300])
def test_vocabularies_of_any_size(v: int) -> None:
    """In one group of tokens or several, the last of them full or not."""
    row = np.random.default_rng(v).normal(0, 1.5, v).astype(np.float32)
    tokens, logprobs = draw(1.0, 0, row)
    want = log_softmax(1.0, row)
    np.testing.assert_allclose(logprobs, want[tokens], atol=1e-6)
    assert v == 1 or excess(np.bincount(tokens, minlength=v), np.exp(want)) < 4
    assert tokens.max() == v - 1, "the last one can be drawn, and none behind it"


def test_positions_and_requests_are_independent() -> None:
    p = np.exp(log_softmax(1.0))
    first, second = draw(1.0, 0)[0], draw(1.0, 1)[0]
    assert excess(np.bincount(first * VOCAB + second, minlength=VOCAB**2), np.outer(p, p).reshape(-1)) < 4
    this, following = first[:-1], first[1:]
    assert excess(np.bincount(this * VOCAB + following, minlength=VOCAB**2), np.outer(p, p).reshape(-1)) < 4


def test_a_draw_depends_on_its_own_row_alone() -> None:
    """Key and position, not the place in the batch."""
    order = np.random.default_rng(0).permutation(DRAWS)
    at = np.arange(DRAWS, dtype=np.int32) % 7
    numbers = np.asarray(jax.jit(uniform)(keys(), at))
    np.testing.assert_array_equal(jax.jit(uniform)(keys()[order], at[order]), numbers[order])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(set(numbers.tolist())) > DRAWS * 0.99
    again = np.asarray(jax.jit(uniform)(keys(), (at + 1) % 7))
    assert abs(np.corrcoef(numbers, again)[0, 1]) < 0.03


def invert(weights: np.ndarray, at: np.ndarray) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (len(at), len(weights)))
    return np.asarray(jax.jit(sampling._invert)(rows, jnp.asarray(at, jnp.float32))[0])


def test_the_inverse_of_the_cumulative_distribution() -> None:
    """The goal lies between the running sums before and behind the token, but for rounding."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, 1000)
    weights[[0, 5, 128, 255, 256, 999]] = 0
    at = np.append(rng.random(4000).astype(np.float32), [0, BELOW_ONE])
    drawn, ends, goal = invert(weights, at), np.cumsum(weights), at.astype(np.float64) * weights.sum()
    assert (weights[drawn] > 0).all()
    assert (goal > (ends - weights)[drawn] - 2e-4).all() and (goal < ends[drawn] + 2e-4).all()
    assert (drawn == np.searchsorted(ends, goal, side="right")).mean() > 0.99


@pytest.mark.parametrize("v", [5, GROUP, 3 * GROUP + 7])
def test_impossible_tokens_are_never_drawn(v: int) -> None:
    """At both ends of the unit interval, next to every border between tokens, and where sums round."""
    rng = np.random.default_rng(v)
    for share in (0.02, 0.5, 0.98):
        weights = np.exp(rng.normal(0, 6, v)).astype(np.float32) * (rng.random(v) > share)
        weights[rng.integers(v)] = 1  # one is possible
        borders = np.cumsum(weights.astype(np.float64)) / weights.sum(dtype=np.float64)
        near = np.concatenate([np.nextafter(np.float32(borders), np.float32(x)) for x in (0, 1)] + [borders])
        at = np.clip(np.concatenate([near, rng.random(500), [0, BELOW_ONE]]), 0, BELOW_ONE).astype(np.float32)
        drawn = invert(weights, at)
        assert (weights[drawn] > 0).all()
        possible = np.flatnonzero(weights)
        assert drawn[-2] == possible[0]
        assert drawn[-1] in possible


def test_tokens_of_minus_infinity_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.full(300, -np.inf, np.float32)
    row[[7, 140, 141]] = [0.0, 1.0, -2.0]
    want = log_softmax(1.0, row[[7, 140, 141]])
    monkeypatch.setattr(sampling, "uniform", lambda key, position: jnp.asarray([0.0, 0.5, BELOW_ONE, 0.0]))
    arguments = jnp.asarray([row] * 4), jnp.zeros((4, 2), jnp.uint32), jnp.zeros(4, jnp.int32)
    tokens, logprobs = jax.jit(lambda *x: sample(*x))(*arguments, jnp.asarray([1.0, 1.0, 1.0, 0.0]))
    assert tokens.tolist() == [7, 140, 141, 140]
    np.testing.assert_allclose(logprobs, want[[0, 1, 2, 1]], atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("size", [1e-6, 1.0, 80.0])
def test_large_and_small_logits(shift: float, size: float) -> None:
    """Nothing overflows; the log-probability is that of the float32 logits."""
    row = (shift + size * np.random.default_rng(0).normal(size=200)).astype(np.float32)
    tokens, logprobs = draw(1.0, 0, row)
    want = log_softmax(1.0, row)
    np.testing.assert_allclose(logprobs, want[tokens], atol=2e-6, rtol=2e-7)
    assert excess(np.bincount(tokens, minlength=200), np.exp(want)) < 4 or size == 80.0
    assert size < 80.0 or len(set(tokens.tolist())) < 10


def test_zero_is_greedy_and_reports_temperature_one() -> None:
    tokens, logprobs = draw(0.0)
    assert set(tokens.tolist()) == {LOGITS.argmax()}
    np.testing.assert_allclose(logprobs, log_softmax(1.0).max(), atol=1e-6)


def test_near_zero_is_greedy_with_certainty() -> None:
    tokens, logprobs = draw(1e-4)
    assert set(tokens.tolist()) == {LOGITS.argmax()}
    np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)


def test_very_hot_is_uniform() -> None:
    tokens, logprobs = draw(1e6)
    np.testing.assert_allclose(logprobs, -np.log(VOCAB), atol=1e-5)
    assert excess(np.bincount(tokens, minlength=VOCAB), np.full(VOCAB, 1 / VOCAB)) < 4


def test_keys_are_hashes_of_identities() -> None:
    identities = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "a"), (0, "a", "1"), (0, 1, "a"), (0, "a1")]
    assert len({request_key(*identity) for identity in identities}) == len(identities)
    assert request_key(3, "step", 7) == request_key(3, "step", 7)
    assert all(0 <= half < 2**32 for identity in identities for half in request_key(*identity))
