"""The compiled update: exact under any split of the same tokens, and what it does when things go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from azr_jax.config import Config, LearnConfig, MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.learn.logprobs import chunk_tokens
from azr_jax.learn.packing import PackedBatch, Trajectory, pack
from azr_jax.learn.state import TrainState, init_state, state_shardings
from azr_jax.learn.step import make_logprobs, make_update, micro_rows, place, summed_gradient
from azr_jax.models.config import ModelConfig
from azr_jax.models.sizes import published_size
from azr_jax.models.transformer import forward, init_params, unembed

MODEL = ModelConfig(64, 32, 64, 2, 4, 2, 8)
CONFIG = Config(
    steps=10,
    learn=LearnConfig(lr=1e-3, entropy_coef=0.01, row_tokens=32, rows=2, remat="none"),
    rollout=RolloutConfig(temperature=0.9),
)
ONE = MeshConfig(1, 1, 1)


def mesh_of(config: MeshConfig = ONE) -> Mesh:
    return make_mesh(config, jax.devices()[: max(config.data, 1) * max(config.fsdp, 1) * max(config.tensor, 1)])


@cache
def params_of() -> dict[str, Any]:
    """Weights with activations and gradients of order 1, and biases and gains off their initial values."""
    keys = iter(jax.random.split(jax.random.key(7), 64))
    params = jax.tree.map(
        lambda x: 4 * x if x.ndim > 2 else x + 0.1 * jax.random.normal(next(keys), x.shape), init_params(MODEL, 0)
    )
    return params | {"embed": 4 * params["embed"], "final_norm": 0.3 * params["final_norm"]}


PROMPTS = tuple(np.random.default_rng(1).integers(1, 9, 12))
RESPONSES = tuple(np.random.default_rng(2).integers(1, 15, 12))
TOKENS = np.random.default_rng(0).integers(0, 64, (12, 24)).astype(np.int32)
ADVANTAGES = np.random.default_rng(3).normal(size=12).astype(np.float32)


def textbook_logprobs(params: dict[str, Any], temperature: float) -> jax.Array:
    """log p(token | prefix) over the vocabulary, [12, 23, 64] for tokens 1.. of every sequence, each in its own row."""
    positions = np.broadcast_to(np.arange(24), TOKENS.shape)
    hidden = forward(params, MODEL, TOKENS, positions, np.ones_like(TOKENS))
    return jax.nn.log_softmax(unembed(params, MODEL, hidden)[:, :-1] / temperature)


def chosen(logp: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1)[..., 0]  # [12, 23]


@cache
def trajectories() -> tuple[Trajectory, ...]:
    """Sampled by a policy near the current one: a few ratios are outside the clip band."""
    current = np.asarray(chosen(jax.jit(textbook_logprobs, static_argnums=1)(params_of(), 0.9)))
    noise = np.random.default_rng(4).normal(0.0, 0.15, current.shape)
    old = np.concatenate([np.zeros((12, 1)), current + noise], axis=1).astype(np.float32)
    made = []
    for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        made.append(Trajectory(TOKENS[i, :p], TOKENS[i, p : p + r], old[i, p : p + r], 0.0, i % 6))
    return tuple(made)


def packed(rows: int = 2, row_tokens: int = 32, order: Sequence[int] = range(12)) -> PackedBatch:
    every = trajectories()
    return pack([every[i] for i in order], ADVANTAGES[list(order)], row_tokens, rows, 12)


@cache
def compiled(function: Callable[..., Any], config: Config, mesh: MeshConfig) -> Callable[..., Any]:
    """make_update or make_logprobs, or the gradient alone, compiled once for all tests."""
    if function is summed_gradient:
        return jax.jit(lambda p, b, n: summed_gradient(p, b, n, config, MODEL, mesh_of(mesh)))
    return function(config, MODEL, mesh_of(mesh))


@cache
def first_state(config: Config, mesh: MeshConfig) -> TrainState:
    return init_state(jax.tree.map(jnp.copy, params_of()), config, MODEL, mesh_of(mesh))


def fresh_state(config: Config = CONFIG, mesh: MeshConfig = ONE) -> TrainState:
    """A copy, because updates donate their state."""
    return jax.tree.map(lambda x: x.copy(), first_state(config, mesh))


def mean_gradient(batch: PackedBatch, config: Config = CONFIG, mesh: MeshConfig = ONE) -> tuple[dict, float]:
    summed = compiled(summed_gradient, config, mesh)
    state = first_state(config, mesh)
    gradient, numerator, totals = summed(state.params, place(batch, mesh_of(mesh)), np.int32(batch.n_micro))
    tokens = float(totals.tokens.sum())
    assert tokens == sum(RESPONSES)
    return jax.tree.map(lambda g: np.asarray(g) / tokens, gradient), float(numerator) / tokens


@pytest.fixture(scope="module")
def plain() -> tuple[dict, float]:
    """Gradient and loss of the textbook: a sequence a row, full logits, no packing, no chunks, no micro-batches."""
    index = np.arange(24)[None, 1:]
    p, r = np.array(PROMPTS)[:, None], np.array(RESPONSES)[:, None]
    mask = (index >= p) & (index < p + r)  # [12, 23], by target
    old = np.zeros(mask.shape, np.float32)
    old[mask] = np.concatenate([item.logprobs for item in trajectories()])
    advantage = ADVANTAGES[:, None]

    def loss(params: dict[str, Any]) -> jax.Array:
        logp = textbook_logprobs(params, 0.9)
        ratio = jnp.exp(chosen(logp) - old)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return jnp.sum(jnp.where(mask, -surrogate - 0.01 * entropy, 0.0)) / mask.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params_of())
    return jax.tree.map(np.asarray, gradient), float(value)


def assert_same(got: tuple[dict, float], want: tuple[dict, float]) -> None:
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(want[0])) > 0.01  # 1e-6 means something
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), got[0], want[0])
    assert got[1] == pytest.approx(want[1], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "row_tokens", "order"),
    [(1, 32, range(12)), (2, 32, range(12)), (8, 32, range(12)), (3, 24, range(11, -1, -1)), (1, 256, range(12))],
    ids=["rows 1", "rows 2", "one micro-batch", "reversed in short rows", "all in one row"],
)
def test_gradient_is_the_textbook_one_for_any_packing(plain, rows: int, row_tokens: int, order) -> None:
    assert_same(mean_gradient(packed(rows, row_tokens, order)), plain)


def test_gradient_does_not_depend_on_row_order(plain) -> None:
    batch = packed(4)
    swapped = np.random.default_rng(0).permutation(4)
    moved = {n: getattr(batch, n)[:, swapped] for n in ("tokens", "positions", "segments", "loss_mask")}
    moved |= {n: getattr(batch, n)[:, swapped] for n in ("weights", "old_logprobs", "advantages", "group")}
    assert_same(mean_gradient(replace(batch, **moved)), plain)


def test_gradient_with_remat_is_the_same(plain) -> None:
    assert_same(mean_gradient(packed(), replace(CONFIG, learn=replace(CONFIG.learn, remat="block"))), plain)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2), MeshConfig(1, 2, 4)], ids=str)
def test_gradient_and_update_do_not_depend_on_the_mesh(plain, mesh: MeshConfig) -> None:
    batch = packed(rows=8)
    assert_same(mean_gradient(batch, mesh=mesh), plain)
    sharded, metrics = one_update(CONFIG, batch, mesh)
    single, expected = one_update(CONFIG, batch)
    # Adam's first step is sign-like, so compare its first moment (linear in the gradient) and the metrics
    first, second = (jax.tree.map(np.asarray, s.opt_state[1].mu) for s in (sharded, single))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), first, second)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    shape = (2, 32 // mesh.fsdp, 64 // mesh.tensor)
    for weights in (sharded.params, sharded.opt_state[1].mu):
        assert {shard.data.shape for shard in weights["blocks"]["gate"].addressable_shards} == {shape}


def one_update(config: Config, batch: PackedBatch, mesh: MeshConfig = ONE) -> tuple[TrainState, dict[str, float]]:
    return compiled(make_update, config, mesh)(fresh_state(config, mesh), batch)


def test_update_is_adamw_on_the_textbook_gradient(plain) -> None:
    state, metrics = one_update(CONFIG, packed())
    norm = float(optax.tree.norm(plain[0]))
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["learner/loss"] == pytest.approx(plain[1], abs=1e-6)
    scale = min(1.0, CONFIG.learn.grad_clip / norm)
    moments = state.opt_state[1]
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * scale * g, atol=1e-6), moments.mu, plain[0])
    before, after = np.asarray(params_of()["blocks"]["up"]), np.asarray(state.params["blocks"]["up"])
    g = scale * plain[0]["blocks"]["up"]
    want = before - 1e-3 * (g / (np.abs(g) + 1e-8) + 0.01 * before)
    sure = np.abs(g) > 1e-4  # where the sign of the gradient is beyond rounding
    assert sure.mean() > 0.5
    np.testing.assert_allclose(after[sure], want[sure], atol=1e-6)
    assert int(state.step) == 1 and int(state.skipped) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_is_on_policy(temperature: float) -> None:
    config = replace(CONFIG, rollout=RolloutConfig(temperature=temperature))
    batch = packed()
    recomputed = compiled(make_logprobs, config, ONE)(params_of(), batch)
    assert not recomputed[batch.loss_mask == 0].any()
    _, metrics = one_update(config, replace(batch, old_logprobs=recomputed))
    assert metrics["learner/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["learner/ratio_max"] == pytest.approx(1.0, abs=2e-6)
    assert metrics["learner/logp_gap_max"] < 2e-6
    assert metrics["learner/clip_low"] == metrics["learner/clip_high"] == 0.0
    assert metrics["learner/kl"] == pytest.approx(0.0, abs=1e-6)


def test_learner_logprobs_are_those_of_each_sequence_alone() -> None:
    batch = packed()
    got = compiled(make_logprobs, CONFIG, ONE)(params_of(), batch)
    found = {}  # every response is found again by its old log-probs
    for m, r in np.ndindex(batch.tokens.shape[:2]):
        for segment in range(1, batch.segments[m, r].max(initial=0) + 1):
            here = (batch.segments[m, r] == segment) & (batch.loss_mask[m, r] == 1)
            found[batch.old_logprobs[m, r][here].tobytes()] = got[m, r][here]
    want = np.asarray(chosen(jax.jit(textbook_logprobs, static_argnums=1)(params_of(), 0.9)))
    for i, item in enumerate(trajectories()):
        start = PROMPTS[i] - 1
        np.testing.assert_allclose(found[item.logprobs.tobytes()], want[i, start : start + RESPONSES[i]], atol=1e-5)


def test_only_what_the_mask_covers_is_trained_on() -> None:
    batch = packed()
    # strictly on-policy, so that no token is clipped and every one counts
    batch = replace(batch, old_logprobs=compiled(make_logprobs, CONFIG, ONE)(params_of(), batch))
    summed = compiled(summed_gradient, CONFIG, ONE)

    def loss(**changes: np.ndarray) -> tuple[float, float]:
        changed = place(replace(batch, **changes), mesh_of())
        gradient, value, _ = summed(first_state(CONFIG, ONE).params, changed, np.int32(batch.n_micro))
        return float(value), float(optax.tree.norm(gradient))

    base = loss()
    padding = np.argwhere(batch.segments == 0)[:3]
    for index in map(tuple, padding):
        tokens = batch.tokens.copy()
        tokens[index] = 17
        assert loss(tokens=tokens) == base  # padding tokens are invisible
    outside = np.argwhere((batch.loss_mask == 0) & (batch.segments > 0))[:3]
    inside = np.argwhere(batch.loss_mask == 1)
    for name in ("old_logprobs", "advantages"):
        for index in map(tuple, outside):
            array = getattr(batch, name).copy()
            array[index] += 5.0
            assert loss(**{name: array}) == base
        for index in map(tuple, inside[::9]):
            array = getattr(batch, name).copy()
            array[index] += 0.05
            assert loss(**{name: array}) != base
    last = np.argwhere((batch.loss_mask == 1) & (np.roll(batch.loss_mask, -1, axis=-1) == 0))
    for index in map(tuple, last[:3]):  # the last response token, where a sampled EOS stands, is a target
        tokens = batch.tokens.copy()
        tokens[index] = (tokens[index] + 1) % 64
        assert loss(tokens=tokens) != base


def test_number_of_micro_batches_does_not_recompile_and_state_is_donated() -> None:
    update = make_update(CONFIG, MODEL, mesh_of())
    state = fresh_state()
    counts = set()
    for n in (2, 12, 7, 1):
        before = state.params["embed"]
        batch = pack(trajectories()[:n], ADVANTAGES[:n], 32, 2, 12)
        state, metrics = update(state, batch)
        assert metrics["learner/tokens"] == sum(len(t.response) for t in trajectories()[:n])
        assert before.is_deleted()
        counts.add(batch.n_micro)
    assert len(counts) > 2
    assert update.compiled._cache_size() == 1  # type: ignore[attr-defined]
    assert int(state.step) == 4


def traced(model: ModelConfig, config: Config, mesh: MeshConfig, rows: int, row_tokens: int) -> Any:
    """The update, traced from shapes alone: nothing is allocated or run."""
    grid = mesh_of(mesh)
    layout = state_shardings(config, model, grid)
    state = jax.eval_shape(lambda: init_state(init_params(model, 0), config, model, grid))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    empty = {name: x for name, x in vars(pack([], [], row_tokens, rows, 1)).items() if isinstance(x, np.ndarray)}
    split = row_sharding(grid, leading=1)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for name, x in empty.items()}
    update = make_update(config, model, grid).compiled  # type: ignore[attr-defined]
    return update.trace(state, batch, np.int32(1), np.float32(1), None)


def compiled_text(*arguments: Any) -> str:
    """The text of a compiled update."""
    return traced(*arguments).lower().compile().as_text()


def test_sizes_beyond_32_bits() -> None:
    """Counts of weights and of logits of a 7B model do not fit an int32."""
    config = replace(CONFIG, learn=replace(CONFIG.learn, dtype="bfloat16", remat="block"))
    state, metrics = traced(published_size("qwen2.5-7b"), config, MeshConfig(1, 8, 1), 8, 8192).out_info
    assert sum(x.size for x in jax.tree.leaves(state.params)) > 2**32
    assert metrics["bf16_changed"].shape == ()


def shapes_in(pattern: str, text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, dims.split(","))) for dims in re.findall(pattern, text)]


def test_no_full_logits_in_the_compiled_update() -> None:
    rows, t, v = 2, 1024, 8192  # four times the logits that may exist at once
    model = ModelConfig(v, 8, 8, 1, 1, 1, 8)
    text = compiled_text(model, CONFIG, ONE, rows, t)
    logits = [shape for shape in shapes_in(r"[a-z]+\d+\[([\d,]+)\]", text) if v in shape]
    assert max(int(np.prod(shape)) for shape in logits) == chunk_tokens(model) * v < rows * t * v


def test_weights_are_gathered_layer_by_layer() -> None:
    layers, d, t = 11, 64, 48  # more layers than the scan unrolls; every size is different
    config = replace(CONFIG, learn=replace(CONFIG.learn, remat="block"))
    text = compiled_text(ModelConfig(1000, d, 256, layers, 8, 4, 8), config, MeshConfig(1, 8, 1), 8, t)
    gathered = shapes_in(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert (d, 256) in gathered  # one layer's feed-forward matrix
    assert not [s for s in gathered if layers in s and len(s) > 2], "a stack of weights is gathered whole"
    assert not [s for s in gathered if t in s], "activations are gathered"


def test_looking_up_embeddings_moves_no_activations_between_rows() -> None:
    t = 48
    text = compiled_text(ModelConfig(1000, 64, 256, 1, 8, 4, 8), CONFIG, MeshConfig(2, 2, 2), 8, t)
    gathered = shapes_in(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert (500, 64) in gathered  # the table, whole along D
    assert {s[0] for s in gathered if t in s} == {2}, "a device gathers tokens of its own two rows only"
    moved = shapes_in(r"= f32\[([\d,]+)\]\S* (?:collective-permute|all-to-all)\(", text)
    assert not [s for s in moved if 64 in s], "activations change places"


@pytest.mark.parametrize("tokens", [48, 50], ids=["tensor divides the tokens", "it does not"])
def test_devices_that_share_rows_share_what_the_backward_pass_keeps(tokens: int) -> None:
    layers, d, rows, share = 11, 64, 2, 12 if tokens == 48 else tokens  # more layers than the scan unrolls
    config = replace(CONFIG, learn=replace(CONFIG.learn, remat="block"))
    model = ModelConfig(1000, d, 320, layers, 8, 4, 8)
    text = compiled_text(model, config, MeshConfig(1, 2, 4), 2 * rows, tokens)
    stacks = {s for s in shapes_in(r"f32\[([\d,]+)\]", text) if s[0] == layers and s[1:2] == (rows,) and s[-1] == d}
    assert stacks == {(layers, rows, share, d)}
    norms = {int(np.prod(s)) for s in shapes_in(r"= f32\[([\d,]+)\]\S* rsqrt\(", text)}
    assert norms and norms <= {rows * share, 1}, "a device normalizes tokens of others"


@pytest.mark.parametrize("poison", ["nan advantage", "no tokens"])
def test_a_bad_step_is_skipped_and_counted(poison: str) -> None:
    batch = packed() if poison == "nan advantage" else pack([], [], 32, 2, 12)
    if poison == "nan advantage":
        batch.advantages[np.where(batch.loss_mask == 1)] = np.nan
    update = compiled(make_update, CONFIG, ONE)
    state, _ = update(fresh_state(), packed())
    before = jax.tree.map(np.array, state)
    state, metrics = update(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    assert metrics["learner/skipped"] == 1.0 and metrics["learner/update_norm"] == 0.0
    assert (int(state.step), int(state.skipped)) == (2, 1)
    state, metrics = update(state, packed())  # and training goes on
    assert metrics["learner/skipped"] == 0.0 and (int(state.step), int(state.skipped)) == (3, 1)


def test_float32_master_moves_where_bfloat16_weights_do_not() -> None:
    config = replace(CONFIG, learn=replace(CONFIG.learn, lr=1e-6, dtype="bfloat16"))
    state, metrics = one_update(config, packed())
    before, after = (np.asarray(p["blocks"]["up"]) for p in (params_of(), state.params))
    assert state.params["blocks"]["up"].dtype == state.opt_state[1].mu["blocks"]["up"].dtype == jnp.float32
    assert (before != after).mean() > 0.95
    assert (before.astype(jnp.bfloat16) != after.astype(jnp.bfloat16)).mean() < 0.1
    assert metrics["learner/update_norm"] > 0


def test_repeated_updates_raise_the_probability_of_good_responses() -> None:
    batch = pack(trajectories()[:2], [1.0, -1.0], 32, 2, 12)
    logprobs, update = compiled(make_logprobs, CONFIG, ONE), compiled(make_update, CONFIG, ONE)
    state = fresh_state()
    start = logprobs(state.params, batch)
    for _ in range(5):
        batch = replace(batch, old_logprobs=logprobs(state.params, batch))
        state, metrics = update(state, batch)
        assert metrics["learner/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    change = logprobs(state.params, batch) - start
    assert change[batch.advantages > 0].sum() > 0 > change[batch.advantages < 0].sum()


def test_metrics_by_role() -> None:
    _, metrics = one_update(CONFIG, packed())
    assert all(name.startswith("learner/") and np.isfinite(value) for name, value in metrics.items())
    low, high = sorted([metrics["learner/entropy_propose"], metrics["learner/entropy_solve"]])
    assert 0 < low <= metrics["learner/entropy"] <= high < np.log(64)
    assert metrics["learner/lr"] == pytest.approx(1e-3)


def test_rows_are_rounded_up_to_the_devices_that_share_them() -> None:
    assert micro_rows(CONFIG, mesh_of()) == 2
    assert micro_rows(CONFIG, mesh_of(MeshConfig(1, 8, 1))) == 8
    assert micro_rows(CONFIG, mesh_of(MeshConfig(2, 2, 2))) == 4
