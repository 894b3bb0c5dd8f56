"""The engine: completions carry the learner's log-probabilities, end rightly, and leave nothing behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.config import Config, LearnConfig
from azr_jax.errors import UserError
from azr_jax.learn.packing import Trajectory, micro_bound, pack
from azr_jax.learn.step import make_logprobs
from azr_jax.models.transformer import forward, unembed
from azr_jax.rollout.request import Completion, Request, request_key
from tests.rollout.engines import EOS, MODEL, SHORT, Letters, assert_same, engine, finish, params_of, requests

DISTINCT = "".join(chr(0x100 + i) for i in range(64))  # a letter for each token


@cache
def baseline() -> tuple[Completion, ...]:
    """40 requests, more than there are slots."""
    return tuple(engine().generate(params_of(), requests(40)))


def cut(completion: Completion, n: int, end: str) -> Completion:
    """The first `n` tokens."""
    return replace(completion, tokens=completion.tokens[:n], logprobs=completion.logprobs[:n], finish=end)


def test_a_completion_is_what_it_says() -> None:
    ends = set()
    for completion in baseline():
        n = len(completion.tokens)
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert len(completion.logprobs) == n and 1 <= n <= 24
        assert (completion.logprobs < 0).all()
        inside = [int(t) in EOS for t in completion.tokens]
        assert not any(inside[:-1]), "tokens after the end"
        assert inside[-1] == (completion.finish == "eos")
        assert completion.finish == "eos" or (completion.finish == "length" and n == 24)
        if inside[-1]:
            ends.add(int(completion.tokens[-1]))
    assert ends == EOS, "every end-of-sequence id ends a response"
    assert {c.finish for c in baseline()} == {"eos", "length"}
    counted = engine()
    counted.generate(params_of(), requests(40))
    stats = counted.stats
    assert stats.sequences == 40 and stats.tokens == sum(len(c.tokens) for c in baseline())
    assert stats.truncated == sum(c.finish == "length" for c in baseline())
    assert stats.prefilled + stats.shared == 40 and stats.shared >= 13
    assert stats.tokens <= stats.slot_steps <= 16 * 4 * stats.blocks


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_learners(temperature: float) -> None:
    """make_logprobs on packed rows, several completions a row, against what the sampler reported."""
    made = requests(20, temperature)
    completions = engine().generate(params_of(), made)
    trajectories = [
        Trajectory(np.asarray(r.prompt, np.int32), c.tokens, c.logprobs, 0.0, 0)
        for r, c in zip(made, completions, strict=True)
    ]
    batch = pack(trajectories, np.zeros(20, np.float32), 48, 2, micro_bound(20, 36, 48, 2))
    assert batch.segments.max() > 1
    rollout = replace(SHORT, temperature=temperature)
    config = Config(rollout=rollout, learn=LearnConfig(remat="none"))
    learned = make_logprobs(config, MODEL, engine().mesh)(params_of(), batch)
    assert batch.loss_mask.sum() == sum(len(c.tokens) for c in completions)
    np.testing.assert_allclose(learned, batch.old_logprobs, atol=1e-5)


@cache
def compiled_forward() -> Any:
    at = jnp.broadcast_to(jnp.arange(36), (40, 36))
    return jax.jit(lambda p, x: unembed(p, MODEL, forward(p, MODEL, x, at, jnp.ones_like(at))))


def logits_of(sequences: list[list[int]]) -> np.ndarray:
    """float64 [40, 36, V] of the learner's forward pass, for up to 40 sequences."""
    tokens = np.zeros((40, 36), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    return np.asarray(compiled_forward()(params_of(), tokens), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_greedy_is_the_argmax_of_the_full_forward() -> None:
    made = requests(8, temperature=0.0)
    completions = engine().generate(params_of(), made)
    logits = logits_of([[*r.prompt, *map(int, c.tokens)] for r, c in zip(made, completions, strict=True)])
    for row, request, completion in zip(logits, made, completions, strict=False):
        n = len(completion.tokens)
        row = row[len(request.prompt) - 1 :][:n]
        np.testing.assert_array_equal(completion.tokens, row.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, log_softmax(row).max(-1), atol=1e-5)


def test_greedy_ignores_the_key_and_sampling_does_not() -> None:
    sampled = [Request((5, 6, 7), request_key(0, i)) for i in range(16)]
    greedy = [replace(r, temperature=0.0) for r in sampled]
    completions = engine().generate(params_of(), sampled + greedy)
    assert len({tuple(c.tokens) for c in completions[:16]}) > 12
    assert len({tuple(c.tokens) for c in completions[16:]}) == 1
    same_key = engine().generate(params_of(), [sampled[0]] * 3)
    assert_same(same_key, completions[:1] * 3)


def test_temperatures_may_differ_within_a_batch() -> None:
    cold, hot = requests(16, 0.7), requests(16, 1.0)
    mixed = [cold[i] if i % 2 else hot[i] for i in range(16)]
    want = [engine().generate(params_of(), made) for made in (hot, cold)]
    assert_same(engine().generate(params_of(), mixed), [want[i % 2][i] for i in range(16)])


def test_lengths_may_differ_within_a_batch() -> None:
    """A response that may be shorter is the beginning of one that may be longer; more than the engine's is not."""
    limits = [1, 2, 3, 4, 5, 8, 23, 24, 25, 1000]
    limited = [replace(r, max_tokens=limits[i % 10]) for i, r in enumerate(requests(40))]
    want = [
        full if len(full.tokens) <= limits[i % 10] else cut(full, limits[i % 10], "length")
        for i, full in enumerate(baseline())
    ]
    assert_same(engine().generate(params_of(), limited), want)


def test_first_tokens_follow_the_softmax() -> None:
    """3072 copies of one prompt: frequencies of the first two tokens, in the engine, against the full forward."""
    prompt = (9, 1, 33, 60)
    copies = [Request(prompt, request_key(1, i), 0.7, max_tokens=2) for i in range(3072)]
    many = engine()
    completions = many.generate(params_of(), copies)
    assert many.stats.prefilled == 1 and many.stats.shared == 3071
    firsts = [int(c.tokens[0]) for c in completions]
    common = max(set(firsts) - EOS, key=firsts.count)
    seconds = [int(c.tokens[1]) for c in completions if int(c.tokens[0]) == common]
    logits = logits_of([[*prompt, common]])[0] / 0.7
    for drawn, row in ((firsts, logits[3]), (seconds, logits[4])):
        expected = np.exp(log_softmax(row)) * len(drawn)
        frequent = expected >= 5
        counts = np.bincount(drawn, minlength=64)
        expected = np.append(expected[frequent], expected[~frequent].sum())
        counts = np.append(counts[frequent], counts[~frequent].sum())
        chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        assert freedom >= 5
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("stop", [("bca",), ("dd", "abab", "c")])
def test_a_stop_string_cuts_after_the_token_that_completes_it(stop: tuple[str, ...]) -> None:
    letters, want = Letters(EOS), []
    for full in baseline():
        ends = (n for n in range(1, len(full.tokens) + 1) if any(s in letters.decode(full.tokens[:n]) for s in stop))
        first = next(ends, None)
        want.append(full if first is None else cut(full, first, "stop"))
    stopping = engine(stop=stop)
    assert_same(stopping.generate(params_of(), requests(40)), want)
    assert {"stop", "eos"} <= {completion.finish for completion in want}
    assert stopping.stats.truncated == sum(completion.finish == "length" for completion in want)


@pytest.mark.parametrize("start, length", [(2, 1), (2, 4), (3, 3), (7, 9), (0, 24), (22, 2)])
def test_a_stop_string_anywhere(start: int, length: int) -> None:
    """Within a block of four, over several, of all tokens, and completed by the last one."""
    index = next(i for i, full in enumerate(baseline()) if len(full.tokens) == 24)
    full, letters = baseline()[index], Letters(EOS, DISTINCT)
    stop = letters.decode(full.tokens[start : start + length])
    n = next(n for n in range(25) if stop in letters.decode(full.tokens[:n]))
    stopping = engine(stop=(stop,), tokenizer=letters)
    (got,) = stopping.generate(params_of(), [requests(40)[index]])
    assert_same([got], [cut(full, n, "stop")])
    assert stopping.text(got).endswith(stop) and stopping.stats.truncated == 0


def test_a_stop_string_interrupted_by_tokens_without_text() -> None:
    """Whatever lies between its letters: blocks and their ends do not matter."""

    def fits(ids: list[int]) -> bool:
        return len(ids) == 24 and ids[0] != ids[-1] and not {ids[0], ids[-1]} & set(ids[1:-1])

    index, full = next((i, full) for i, full in enumerate(baseline()) if fits(full.tokens.tolist()))
    letters = Letters(EOS, DISTINCT, silent=full.tokens[1:-1].tolist())
    stop = letters.decode(full.tokens)
    assert len(stop) == 2, "the first letter and the last, and many blocks between them"
    (got,) = engine(stop=(stop,), tokenizer=letters).generate(params_of(), [requests(40)[index]])
    assert_same([got], [cut(full, 24, "stop")])


def test_a_stop_string_is_found_while_the_next_block_runs() -> None:
    index = next(i for i, full in enumerate(baseline()) if len(full.tokens) == 24)
    full, letters = baseline()[index], Letters(EOS, DISTINCT)
    stopping = engine(stop=(letters.decode(full.tokens[1:3]),), tokenizer=letters)
    stopping.load(params_of(), version=7)
    stopping.submit([requests(40)[index]])
    stopping.step()
    assert not stopping.poll()
    stopping.step()
    assert stopping._flight is not None and not stopping.busy
    ((name, got),) = stopping.poll().items()
    assert name == index and not stopping.poll()
    assert_same([got], [cut(full, 3, "stop")])
    others = [r for r in requests(40) if r.id != index]
    stopping.stop = ("nothing says this",)
    stopping.submit(others)
    done = finish(stopping)
    assert_same([done[r.id] for r in others], [baseline()[r.id] for r in others])
    assert stopping.stats.blocks > 2 and {c.version for c in (got, *done.values())} == {7}


def test_priority_decides_who_goes_first() -> None:
    crowd = engine()
    crowd.load(params_of())
    ranked = [replace(r, priority=float(r.id % 3)) for r in requests(40)]
    crowd.submit(ranked)
    crowd.step()
    running = {name for name, sequence in crowd._live.items() if sequence.slot is not None}
    first = sorted(ranked, key=lambda r: (-r.priority, r.id))[:16]
    assert running == {r.id for r in first}
    done = finish(crowd)
    assert_same([done[i] for i in range(40)], baseline())


def test_cancelled_requests_leave_no_trace() -> None:
    crowd = engine()
    crowd.load(params_of())
    crowd.submit(requests(40))
    gone: set[object] = set()
    for i in range(0, 40, 3):  # waiting, running, finished
        crowd.cancel([i, "nobody"])
        gone.add(i)
        if crowd.busy:
            crowd.step()
    done = finish(crowd)
    assert not gone & set(done)
    crowd.submit([requests(40)[0]])  # the id is free again
    assert_same([finish(crowd)[0]], baseline()[:1])
    crowd.submit(requests(2))
    crowd.cancel([0, 1])
    assert not crowd.busy and not crowd.poll()


def test_memory_stays_flat_over_two_thousand_requests() -> None:
    crowd = engine(stop=("abca",))
    rng = np.random.default_rng(0)

    def rounds(count: int, first: int) -> None:
        for i in range(first, first + count):
            some = [replace(r, key=request_key(i, r.id), max_tokens=int(rng.integers(1, 13))) for r in requests(40)]
            crowd.submit(some)
            crowd.step()
            crowd.cancel([int(n) for n in rng.integers(0, 40, 3)])
            finish(crowd)

    crowd.load(params_of())
    scheduler_free = crowd._device.layout.pages - 1
    rounds(3, 0)
    gc.collect()
    before = len(jax.live_arrays())
    rounds(50, 3)
    gc.collect()
    assert len(jax.live_arrays()) <= before + 5, "at most the outputs of the block that runs"
    scheduler = crowd._scheduler
    assert scheduler is not None and not scheduler._live and not crowd._live and not crowd._done
    crowd.submit(requests(1))
    finish(crowd)  # one more plan
    scheduler.plan()
    assert not scheduler._waiting and scheduler.running == scheduler.waiting == 0
    crowd.release()
    (shard,) = scheduler._shards
    assert shard.pool.free == scheduler_free and len(shard.free_slots) == 16
    assert not shard.prefixes._pages and not any(shard.pool.holders)
    gc.collect()
    assert len(jax.live_arrays()) < before, "weights and cache are gone"


def test_prompts_that_do_not_fit() -> None:
    small = engine()
    assert [small.fits((1,) * n) for n in (0, 1, 12, 13)] == [False, True, True, False]
    for prompt in ((), (1,) * 13):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens, not 1 to 12"):
            small.generate(params_of(), [Request((1,), (0, 0)), Request(prompt, (0, 0))])
    assert not small.busy
    assert small.generate(params_of(), []) == []


def test_refusals() -> None:
    some = engine()
    with pytest.raises(ValueError, match="nothing was submitted"):
        some.step()
    with pytest.raises(ValueError, match="`load` comes first"):
        some.submit([Request((1,), (0, 0))])
    some.load(params_of(), 3)
    with pytest.raises(ValueError, match="temperature = -1.0 must be 0 or more"):
        some.submit([Request((1,), (0, 0), -1.0)])
    with pytest.raises(ValueError, match="max_tokens = 0 must be 1 or more"):
        some.submit([Request((1,), (0, 0), max_tokens=0)])
    twice = [Request((1,), (0, 0), id="a"), Request((2,), (0, 0), id="a")]
    with pytest.raises(ValueError, match="a request with id 'a' is under way already"):
        some.submit(twice)
    assert not some.busy, "all or none"
    some.submit(twice[:1])
    for refused in (lambda: some.load(params_of(6)), lambda: some.load(params_of(), 4), some.release):
        with pytest.raises(ValueError, match="the engine is busy: its weights cannot"):
            refused()
    with pytest.raises(ValueError, match="the engine is busy"):
        some.generate(params_of(), twice[:1])
    while some.busy:
        some.step()
    with pytest.raises(ValueError, match="a request with id 'a' is under way already"):
        some.submit(twice[:1])
    with pytest.raises(ValueError, match="the engine is busy with other requests"):
        some.generate(params_of(), twice[:1])
    assert some.poll()["a"].version == 3
    some.generate(params_of(), twice)


def test_a_cache_too_small_for_one_sequence() -> None:
    with pytest.raises(UserError, match="room for 24 tokens, but one sequence has up to 35: lower rollout.max_prompt"):
        engine(replace(SHORT, cache_gb=3.5 * 2048 / 2**30)).load(params_of())


def test_an_int8_cache_drifts_a_little() -> None:
    """From the full forward on its own samples; heads of 8 columns and a scale take 12 bytes instead of 32."""
    small = engine(replace(SHORT, cache_dtype="int8"))
    made = requests(40)
    completions = small.generate(params_of(), made)
    logits = logits_of([[*r.prompt, *map(int, c.tokens)] for r, c in zip(made, completions, strict=True)])
    drift = []
    for row, request, completion in zip(logits, made, completions, strict=False):
        row = log_softmax(row[len(request.prompt) - 1 :][: len(completion.tokens)])
        drift.append(np.abs(row[np.arange(len(row)), completion.tokens] - completion.logprobs))
    drift = np.concatenate(drift)
    assert 1e-4 < drift.mean() < 1e-2 and drift.max() < 0.1
    order = np.random.default_rng(1).permutation(40)
    again = engine(replace(SHORT, cache_dtype="int8"))
    assert_same(again.generate(params_of(), [made[i] for i in order]), [completions[i] for i in order])
    full = engine()
    full.load(params_of())
    assert 2.5 * small._device.layout.bytes_per_page(MODEL) < full._device.layout.bytes_per_page(MODEL)


def test_a_failed_launch_leaves_no_prompt_that_was_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler had planned its pages already: the engine must not believe that they hold anything."""
    some, made = engine(), requests(6)
    want = engine().generate(params_of(), made)
    some.load(params_of())
    some.submit(made)
    with monkeypatch.context() as patched:
        patched.setattr(some._device, "prefill", lambda prefills: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            some.step()
    assert not some.busy
    with pytest.raises(ValueError, match="`load` comes first"):
        some.submit(made)
    assert_same(some.generate(params_of(), made), want)


def test_weights_are_held_by_their_owner_only() -> None:
    some = engine()
    params = jax.tree.map(jnp.copy, params_of())
    some.load(params)
    first = weakref.ref(jax.tree.leaves(params)[0])
    del params
    gc.collect()
    assert first() is None


def test_working_copies_count_as_memory() -> None:
    """64 slots of 14k tokens each would be copied into one piece: more than a machine has, said before it is tried."""
    large = replace(SHORT, max_prompt=6144, max_response=8096, slots=2**16, page=256)
    some = engine(large)
    with pytest.raises(UserError, match=r"GiB of working copies for 65536 rollout.slots.* lower .*rollout.slots"):
        some.load(params_of())
