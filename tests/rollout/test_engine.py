"""The engine: a completion depends on its request alone, carries the learner's log-probabilities, and ends rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.packing import Trajectory, micro_bound, pack
from azr_jax.learn.state import param_shardings
from azr_jax.learn.step import make_logprobs
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Params, forward, init_params, unembed
from azr_jax.rollout.decode import decode, keep_rows, start
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key

MODEL = ModelConfig(64, 32, 64, 2, 4, 2, 8)
ROLLOUT = RolloutConfig(max_prompt=12, max_response=24, slots=16, block=4)
ONE = MeshConfig(1, 1, 1)
MANY_EOS = frozenset(range(0, 64, 7))  # a response ends soon, with one of ten tokens
EOS_COUNT = 16  # every engine here gets as many ids, some outside the vocabulary: one shape, compiled once


class Letters:
    """Stands in for the tokenizer: token i is one of four letters, end-of-sequence is nothing."""

    pad_id = 0

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("abcd"[i % 4] for i in ids if i not in self.eos_ids)


@cache
def params_of() -> Params:
    """Random weights whose distributions are neither flat nor certain."""
    keys = iter(jax.random.split(jax.random.key(5), 32))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), init_params(MODEL, 0))
    return params | {"final_norm": 0.8 * params["final_norm"]}


def engine(
    config: RolloutConfig = ROLLOUT, eos: frozenset[int] = frozenset({3}), mesh: MeshConfig = ONE, stop: str = ""
) -> Engine:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    ids = eos | frozenset(range(64, 64 + EOS_COUNT - len(eos)))
    return Engine(MODEL, config, Letters(ids), make_mesh(mesh, devices), (stop,) if stop else ())


def requests(count: int, temperature: float = 1.0, longest: int = 6) -> list[Request]:
    """Prompts of 1 to `longest` tokens; every third repeats an earlier one with another key."""
    rng = np.random.default_rng(0)
    made: list[Request] = []
    for i in range(count):
        prompt = tuple(int(t) for t in rng.integers(0, 64, rng.integers(1, longest + 1)))
        if i % 3 == 2:
            prompt = made[int(rng.integers(0, i))].prompt
        made.append(Request(prompt, request_key(0, "test", i), temperature))
    return made


def assert_same(got: Sequence[Completion], want: Sequence[Completion]) -> None:
    """Tokens and endings exactly; log-probabilities to 1e-5 (other shapes add up in another order)."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert a.finish == b.finish


@cache
def baseline() -> tuple[Completion, ...]:
    """20 requests, more than a batch, ends spread over the whole length."""
    return tuple(engine(eos=MANY_EOS).generate(params_of(), requests(20)))


def test_a_completion_is_what_it_says():
    ends = set()
    for completion in baseline():
        n = len(completion.tokens)
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert len(completion.logprobs) == n and 1 <= n <= 24
        assert (completion.logprobs < 0).all()
        inside = [int(t) in MANY_EOS for t in completion.tokens]
        assert not any(inside[:-1]), "tokens after the end"
        assert inside[-1] == (completion.finish == "eos")
        assert completion.finish == "eos" or n == 24
        if inside[-1]:
            ends.add(int(completion.tokens[-1]))
    assert len(ends) > 3, "every end-of-sequence id ends a response"


def test_a_response_cut_by_its_length_has_no_end_of_sequence():
    some = engine(eos=frozenset({3, 40}))
    completions = some.generate(params_of(), requests(8))
    cut = [c for c in completions if c.finish == "length"]
    assert cut and all(len(c.tokens) == 24 and not {3, 40} & set(c.tokens.tolist()) for c in cut)
    assert some.stats.truncated == len(cut) and some.stats.sequences == 8
    assert some.stats.tokens == sum(len(c.tokens) for c in completions)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_learners(temperature):
    """make_logprobs on packed rows, several completions a row, against what the sampler reported."""
    made = requests(20, temperature)
    completions = engine(eos=MANY_EOS).generate(params_of(), made)
    trajectories = [
        Trajectory(np.asarray(r.prompt, np.int32), c.tokens, c.logprobs, 0.0, 0)
        for r, c in zip(made, completions, strict=True)
    ]
    batch = pack(trajectories, np.zeros(20, np.float32), 48, 2, micro_bound(20, 36, 48, 2))
    assert batch.segments.max() > 1
    rollout = replace(ROLLOUT, temperature=temperature)
    config = Config(rollout=rollout, learn=LearnConfig(remat="none"))
    learned = make_logprobs(config, MODEL, engine().mesh)(params_of(), batch)
    assert batch.loss_mask.sum() == sum(len(c.tokens) for c in completions)
    np.testing.assert_allclose(learned, batch.old_logprobs, atol=1e-5)


def test_alone_as_in_a_batch():
    single = engine(replace(ROLLOUT, slots=1), MANY_EOS)
    assert_same([single.generate(params_of(), [r])[0] for r in requests(20)], baseline())


def test_in_another_order():
    order = np.random.default_rng(1).permutation(20)
    shuffled = engine(eos=MANY_EOS).generate(params_of(), [requests(20)[i] for i in order])
    assert_same(shuffled, [baseline()[i] for i in order])


@pytest.mark.parametrize(("slots", "block"), [(6, 64), (32, 64)])
def test_in_another_batch_size_and_block(slots, block):
    """A size that is no power of two and a batch with room to spare, each decoded in one block."""
    other = engine(replace(ROLLOUT, slots=slots, block=block), MANY_EOS)
    assert_same(other.generate(params_of(), requests(20)), baseline())


def test_padded_to_other_limits():
    """Short and long prompts together; under twice the limit they share a bucket, and a prefix stays what it was."""
    mixed = requests(16, longest=12)
    assert {len(r.prompt) > 6 for r in mixed} == {True, False}
    want = engine(replace(ROLLOUT, block=64), MANY_EOS).generate(params_of(), mixed)
    wider = engine(replace(ROLLOUT, max_prompt=24, max_response=31, block=64), MANY_EOS)
    for short, long in zip(want, wider.generate(params_of(), mixed), strict=True):
        n = len(short.tokens)
        np.testing.assert_array_equal(long.tokens[:n], short.tokens)
        np.testing.assert_allclose(long.logprobs[:n], short.logprobs, atol=1e-5)
        assert (len(long.tokens) > n) == (short.finish == "length")


@pytest.mark.parametrize(("mesh", "block"), [(MeshConfig(1, 8, 1), 64), (MeshConfig(2, 2, 2), 4)], ids=str)
def test_on_eight_devices(mesh, block):
    """The second one also shrinks batches, down to sizes that the devices do not divide."""
    many = engine(replace(ROLLOUT, block=block), MANY_EOS, mesh)
    params = jax.device_put(params_of(), param_shardings(MODEL, many.mesh))
    assert_same(many.generate(params, requests(20)), baseline())


def test_long_responses_move_to_smaller_batches_unharmed(monkeypatch):
    """13 rows end at once and 3 do not: the batch shrinks, and nothing else changes."""
    short, long = requests(16), {2, 7, 13}
    plain = engine(replace(ROLLOUT, block=64)).generate(params_of(), short)
    ends = frozenset(int(c.tokens[1]) for i, c in enumerate(plain) if i not in long)
    kept = engine(replace(ROLLOUT, block=64), ends).generate(params_of(), short)
    shrunk: list[int] = []
    monkeypatch.setattr(
        Engine,
        "_shrink",
        lambda self, state, rows, size, do=Engine._shrink: shrunk.append(size) or do(self, state, rows, size),
    )
    got = engine(eos=ends).generate(params_of(), short)
    assert_same(got, kept)
    assert shrunk and shrunk[-1] < 16 and shrunk == sorted(shrunk, reverse=True)
    assert len({len(c.tokens) for c in got}) > 1


def test_greedy_is_the_argmax_of_the_full_forward():
    made = requests(8, temperature=0.0)

    @jax.jit
    def last_logits(tokens: jax.Array, length: jax.Array) -> jax.Array:
        columns = jnp.arange(36)
        hidden = forward(params_of(), MODEL, tokens[None], columns[None], (columns < length)[None].astype(int))
        return unembed(params_of(), MODEL, hidden[0, length - 1])

    for request, completion in zip(made, engine().generate(params_of(), made), strict=True):
        ids = list(request.prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            logits = np.asarray(last_logits(jnp.asarray(ids + [0] * (36 - len(ids)), jnp.int32), len(ids)))
            assert token == logits.argmax()
            assert logprob == pytest.approx(float(jax.nn.log_softmax(logits).max()), abs=1e-5)
            ids.append(int(token))


def test_greedy_ignores_the_key_and_sampling_does_not():
    prompt = (5, 6, 7)
    sampled = [Request(prompt, request_key(0, i)) for i in range(16)]
    greedy = [replace(r, temperature=0.0) for r in sampled]
    completions = engine().generate(params_of(), sampled + greedy)
    assert len({tuple(c.tokens) for c in completions[:16]}) > 12
    assert len({tuple(c.tokens) for c in completions[16:]}) == 1
    same_key = engine().generate(params_of(), [sampled[0]] * 3)
    assert len({tuple(c.tokens) for c in same_key}) == 1


def test_temperatures_may_differ_within_a_batch():
    cold, hot = requests(16, 0.7), requests(16, 1.0)
    mixed = [cold[i] if i % 2 else hot[i] for i in range(16)]
    want = [engine().generate(params_of(), made) for made in (hot, cold)]
    assert_same(engine().generate(params_of(), mixed), [want[i % 2][i] for i in range(16)])


def test_first_tokens_follow_the_softmax():
    """3072 copies of one prompt: frequencies of the first two tokens, in the engine, against the full forward."""
    many = engine(replace(ROLLOUT, max_response=2, slots=512))
    prompt = (9, 1, 33, 60)
    completions = many.generate(params_of(), [Request(prompt, request_key(1, i), 0.7) for i in range(3072)])

    def softmax(ids: tuple[int, ...]) -> np.ndarray:
        tokens = jnp.asarray([ids])
        hidden = forward(params_of(), MODEL, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
        return np.asarray(jax.nn.softmax(unembed(params_of(), MODEL, hidden[0, -1]) / 0.7), np.float64)

    firsts = [int(c.tokens[0]) for c in completions]
    common = max(set(firsts) - {3}, key=firsts.count)
    seconds = [int(c.tokens[1]) for c in completions if int(c.tokens[0]) == common]
    for drawn, probability in ((firsts, softmax(prompt)), (seconds, softmax((*prompt, common)))):
        expected = probability * len(drawn)
        frequent = expected >= 5
        counts = np.bincount(drawn, minlength=64)
        expected = np.append(expected[frequent], expected[~frequent].sum())
        counts = np.append(counts[frequent], counts[~frequent].sum())
        chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        assert freedom >= 5
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_a_stop_string_cuts_after_the_token_that_completes_it():
    stop = "bca"
    letters = Letters(MANY_EOS)
    free = engine(eos=MANY_EOS).generate(params_of(), requests(20))
    stopping = engine(eos=MANY_EOS, stop=stop)
    kinds = set()
    for got, want in zip(stopping.generate(params_of(), requests(20)), free, strict=True):
        text = letters.decode(want.tokens)
        if stop not in text:
            np.testing.assert_array_equal(got.tokens, want.tokens)
            assert got.finish == want.finish
        else:
            n = len(got.tokens)
            assert got.finish == "stop"
            np.testing.assert_array_equal(got.tokens, want.tokens[:n])
            np.testing.assert_allclose(got.logprobs, want.logprobs[:n], atol=1e-5)
            assert stop in letters.decode(got.tokens) and stop not in letters.decode(got.tokens[:-1])
        kinds.add(got.finish)
    assert {"stop", "eos"} <= kinds


def test_a_stop_string_completed_by_the_last_token_is_a_stop():
    (free,) = engine(eos=frozenset()).generate(params_of(), requests(1))
    stop = Letters(frozenset()).decode(free.tokens)
    other = engine(eos=frozenset(), stop=stop)
    (got,) = other.generate(params_of(), requests(1))
    np.testing.assert_array_equal(got.tokens, free.tokens)
    assert got.finish == "stop" and other.stats.truncated == 0


def test_nothing_is_compiled_a_second_time():
    busy = engine(eos=MANY_EOS)
    busy.generate(params_of(), requests(20))
    programs = (start, decode, keep_rows)
    before = [program._cache_size() for program in programs]
    assert_same(engine(eos=MANY_EOS).generate(params_of(), requests(20)), baseline())
    assert [program._cache_size() for program in programs] == before


def test_prompts_that_do_not_fit():
    small = engine()
    assert [small.fits((1,) * n) for n in (0, 1, 12, 13)] == [False, True, True, False]
    for prompt in ((), (1,) * 13):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens, not 1 to 12"):
            small.generate(params_of(), [Request((1,), (0, 0)), Request(prompt, (0, 0))])
    assert small.generate(params_of(), []) == []
