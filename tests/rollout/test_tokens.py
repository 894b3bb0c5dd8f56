"""Ids from the sampler to the learner: untouched by text, cut at no token's middle, banned ones in neither."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from azr_jax.attempts import Attempt
from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.packing import Trajectory, pack
from azr_jax.learn.state import init_state
from azr_jax.learn.step import make_logprobs, make_update
from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key
from azr_jax.rollout.scheduler import Scheduler
from azr_jax.tasks.full import FullFormat
from azr_jax.tasks.kinds import Kind, Role
from tests.models import tokenizer_folders as made
from tests.rollout.engines import MODEL, engine, params_of

ROLLOUT = RolloutConfig(max_prompt=8, max_response=16, slots=16, block=4, temperature=0.8)
BANNED = [1, 5, 39, 41, 42, 43, 44, 63]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = made.byte_level(["<|endoftext|>"], ["er>\n\nUser: next", "</answer></answer>"])
    made.save(folder, fast, eos_token="<|endoftext|>")
    return load_tokenizer(folder)


def engine_for(tokenizer: Tokenizer) -> Engine:
    grid = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return Engine(MODEL, ROLLOUT, tokenizer, grid, FullFormat().stop)


@pytest.mark.parametrize(
    ("before", "last", "after"),
    [
        ("5</answ", "er>\n\nUser: next", "more"),  # the token that completes the string goes on behind it
        ("5\n", "</answer></answer>", ""),
        ("é 5</answer", ">", "more"),
    ],
)
def test_a_stop_string_that_ends_inside_a_token(tokenizer, before, last, after) -> None:
    """The ids up to that token are kept as sampled; the parser's text ends with the stop string."""
    engine = engine_for(tokenizer)
    (end,) = tokenizer.encode(last)
    ids = [*tokenizer.encode(before), end, *tokenizer.encode(after)]
    keep = len(tokenizer.encode(before)) + 1
    sequence = Scheduler(1, 8, 8, 4).submit(Request((1,), (0, 0)), 100)
    found = None
    for n in range(0, len(ids) + 3, 3):  # as blocks bring them
        sequence.tokens = ids[:n]
        found = found or engine._stop_cut(sequence)
    assert found == keep
    completion = Completion(np.array(ids[:keep], np.int32), np.zeros(keep, np.float32), "stop")
    assert engine.text(completion) == before.removesuffix("</answ").removesuffix("</answer") + "</answer>"


def test_the_cut_text_is_well_formed(tokenizer) -> None:
    engine = engine_for(tokenizer)
    text = "so</think><answer>\n```output\n5\n```\n</answ"
    ids = [*tokenizer.encode(text), tokenizer.ids["er>\n\nUser: next"]]
    completion = Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop")
    assert FullFormat().parse_answer(Kind.DEDUCTION, engine.text(completion)) == "5"
    assert FullFormat().parse_answer(Kind.DEDUCTION, tokenizer.decode(ids)) is None


def test_ids_reach_the_learner_as_sampled(tokenizer) -> None:
    """Spelled in bytes, which is not how the tokenizer would write the same text."""
    letters = {name: i for name, i in tokenizer.ids.items() if len(name) == 1}
    ids = np.array([letters[c] for c in "return"], np.int32)
    assert tokenizer.encode(tokenizer.decode(ids)) != ids.tolist() and tokenizer.decode(ids) == "return"
    completion = Completion(ids, np.linspace(-1, -2, len(ids), dtype=np.float32), "length")
    attempt = Attempt(Role.SOLVE, Kind.DEDUCTION, (), tokenizer.prompt("def"), completion=completion)
    batch = pack([attempt.trajectory(0)], np.ones(1, np.float32), 32, 1, 1)
    trained = batch.loss_mask == 1
    assert batch.tokens[trained].tolist() == ids.tolist()
    assert batch.old_logprobs[trained].tolist() == completion.logprobs.tolist()


def test_banned_tokens_are_in_neither_distribution() -> None:
    """Never sampled, and the learner's log-probabilities are still the sampler's."""
    config = Config(rollout=ROLLOUT, learn=LearnConfig(row_tokens=32, rows=2, remat="none", entropy_coef=0.01, kl="k3"))
    params = params_of()
    requests = [
        Request((7, 8, 9 + i), request_key(0, i), (0.8, 0.0)[i == 15], max_tokens=ROLLOUT.max_response)
        for i in range(16)
    ]
    engines = engine(), engine(banned=tuple(BANNED))
    free, bound = (each.generate(params, requests) for each in engines)
    grid, banned = engines[1].mesh, jnp.isin(jnp.arange(MODEL.vocab_size), jnp.array(BANNED))
    sampled = np.concatenate([c.tokens for c in bound])
    assert set(BANNED) & set(np.concatenate([c.tokens for c in free]).tolist())  # else this shows nothing
    assert not set(BANNED) & set(sampled.tolist())

    pairs = [(r, c) for r, c in zip(requests, bound, strict=True) if r.temperature]
    every = [Trajectory(np.array(r.prompt, np.int32), c.tokens, c.logprobs, 0.0, 0, 0, False) for r, c in pairs]
    batch = pack(every, np.linspace(-1, 1, len(every), dtype=np.float32), 32, 2, 8)
    trained = batch.loss_mask == 1
    with_ban, without = (make_logprobs(config, MODEL, grid, b)(params, batch)[trained] for b in (banned, None))
    np.testing.assert_allclose(with_ban, batch.old_logprobs[trained], atol=1e-5)
    assert np.abs(without - batch.old_logprobs[trained]).max() > 1e-2

    state = init_state(jax.tree.map(jnp.copy, params), config, MODEL, grid)
    _, metrics = make_update(config, MODEL, grid, params, banned=banned)(state, batch)
    assert metrics["learner/ratio_max"] == pytest.approx(1.0, abs=1e-5) and metrics["learner/skipped"] == 0
    assert metrics["learner/reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < metrics["learner/entropy"] < np.log(64 - len(BANNED))


def test_a_run_bans_on_request(tmp_path) -> None:
    from azr_jax.train import Run, with_prompts

    config = Config(rollout=replace(ROLLOUT, ban_untrained_tokens=True))
    pool = SimpleNamespace(stats=dict)
    run = Run(*with_prompts(config), pool)  # type: ignore[arg-type]
    assert run.banned is None
    run.fresh_state()
    assert run.banned is not None and run.banned.shape == (run.model.vocab_size,)
    ends = sorted(run.engine.tokenizer.eos_ids)
    assert not np.asarray(run.banned)[ends].any()
    run.engine.load(run.fresh_state().params)
    (completion,) = run.engine.generate(run.first_weights(), [Request((5, 6), request_key(0, 1), max_tokens=8)])
    assert not np.asarray(run.banned)[completion.tokens].any()
