"""Filters against the definitions written out in numpy, and in the engine beside requests that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.errors import UserError
from azr_jax.models.transformer import forward, unembed
from azr_jax.rollout.request import Filters, Request, request_key
from azr_jax.rollout.sampling import Filtering, filter_logits
from tests.rollout.engines import MODEL, assert_same, engine, params_of, requests

SOME = [
    Filters(),
    Filters(top_k=3),
    Filters(top_k=1),
    Filters(top_k=1000),
    Filters(top_p=0.6),
    Filters(top_p=1e-6),
    Filters(min_p=0.3),
    Filters(repetition=1.7),
    Filters(repetition=0.5),
    Filters(presence=1.5),
    Filters(frequency=-0.8),
    Filters(top_k=12, top_p=0.8, min_p=0.05, repetition=1.3, presence=0.4, frequency=0.3),
]


def filtered(logits: np.ndarray, f: Filters, t: float, prompt: Any, response: Any) -> np.ndarray:
    """One row of logits, with what may not be sampled at -inf: penalties, then the three cuts, each on its own."""
    out = logits.astype(np.float64).copy()
    for token in {*map(int, prompt), *map(int, response)}:
        out[token] = out[token] / f.repetition if out[token] > 0 else out[token] * f.repetition
    for token in map(int, response):
        out[token] -= f.frequency
    for token in set(map(int, response)):
        out[token] -= f.presence
    p = np.exp((out - out.max()) / (t or 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.ones(len(p), bool)
    if f.top_k:
        keep[order[f.top_k :]] = False
    if f.top_p < 1:
        enough = int(np.searchsorted(np.cumsum(p[order]), f.top_p)) + 1
        keep[order[enough:]] = False
    keep &= p >= f.min_p * p.max()
    return np.where(keep, out, -np.inf)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("v", [37, 200])
def test_against_numpy(v: int, temperature: float) -> None:
    """Every kind of filter in one batch, with banned tokens among the logits."""
    rng = np.random.default_rng(v)
    b = len(SOME)
    logits = rng.normal(0, 2, (b, v)).astype(np.float32)
    logits[:, [4, 20]] = -np.inf
    prompts, responses = rng.integers(0, v, (b, 7)), rng.integers(0, v // 2, (b, 30))
    prompt, response = np.zeros((b, v), bool), np.zeros((b, v), np.int32)
    for row in range(b):
        prompt[row, prompts[row]] = True
        np.add.at(response[row], responses[row], 1)
    parts = [np.array([getattr(f, name) for f in SOME]) for name in Filtering._fields[:6]]
    filtering = Filtering(
        *(x.astype(np.int32 if i == 0 else np.float32) for i, x in enumerate(parts)), prompt, response
    )
    got = np.asarray(jax.jit(filter_logits)(logits, filtering, np.full(b, temperature, np.float32)))
    for row, f in enumerate(SOME):
        want = filtered(logits[row], f, temperature, prompts[row], responses[row])
        np.testing.assert_array_equal(np.isfinite(got[row]), np.isfinite(want), err_msg=str(f))
        np.testing.assert_allclose(got[row], want, atol=1e-5, err_msg=str(f))
    np.testing.assert_array_equal(got[0], logits[0], err_msg="no filter changes nothing, bit for bit")


def test_ties_stay() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, 3.0, 0.0]] * 2)
    none = [jnp.zeros(2, jnp.int32), *(jnp.full(2, x) for x in (1.0, 0.0, 1.0, 0.0, 0.0))]
    seen = jnp.zeros((2, 5), bool), jnp.zeros((2, 5), jnp.int32)
    filtering = Filtering(*none, *seen)._replace(top_k=jnp.asarray([2, 0]), top_p=jnp.asarray([1.0, 0.2]))
    got = filter_logits(logits, filtering, jnp.ones(2))
    assert np.isfinite(np.asarray(got)).tolist() == [[False, True, True, True, False]] * 2


@pytest.mark.parametrize("name, value", [("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 1), ("repetition", 0)])
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} = {value} must be"):
        Filters(**{name: value})


def test_in_the_engine() -> None:
    """Every second request has filters: its samples have the log-probabilities of the filtered distribution."""
    plain = requests(36, 0.8)
    mixed = [replace(r, filters=SOME[i // 2 % len(SOME)]) if i % 2 else r for i, r in enumerate(plain)]
    mixed += [Request(plain[i].prompt, request_key(7, i), 1.0, filters=SOME[2]) for i in range(4)]
    some = engine()
    completions = some.generate(params_of(), mixed)
    assert_same(completions[:36:2], engine().generate(params_of(), plain)[::2])
    greedy = engine().generate(params_of(), [Request(plain[i].prompt, (0, 0), 0.0) for i in range(4)])
    for got, want in zip(completions[36:], greedy, strict=True):
        np.testing.assert_array_equal(got.tokens, want.tokens)  # top_k 1 is greedy
        np.testing.assert_array_equal(got.logprobs, 0)
    tokens = np.zeros((40, 36), np.int32)
    for row, (request, completion) in enumerate(zip(mixed, completions, strict=True)):
        ids = [*request.prompt, *completion.tokens]
        tokens[row, : len(ids)] = ids
    at = jnp.broadcast_to(jnp.arange(36), tokens.shape)
    run = jax.jit(lambda p, x: unembed(p, MODEL, forward(p, MODEL, x, at, jnp.ones_like(at))))
    logits = np.asarray(run(params_of(), tokens))
    changed = 0
    for row, request, completion in zip(logits, mixed, completions, strict=True):
        if request.filters is None:
            continue
        for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            one = row[len(request.prompt) - 1 + i]
            want = filtered(one, request.filters, request.temperature, request.prompt, completion.tokens[:i])
            assert np.isfinite(want[token])
            assert logprob == pytest.approx(log_softmax(want / request.temperature)[token], abs=2e-5)
            changed += abs(logprob - log_softmax(one / request.temperature)[token]) > 1e-2
    assert changed > 50
    order = np.random.default_rng(1).permutation(40)
    assert_same(engine().generate(params_of(), [mixed[i] for i in order]), [completions[i] for i in order])
