"""Logits and greedy texts against `transformers`, every family: stored ones, and live ones where torch is installed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from azr_jax.config import MeshConfig, RolloutConfig
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.learn.state import param_shardings
from azr_jax.models.config import FAMILIES, ModelConfig
from azr_jax.models.transformer import Params, forward, unembed
from azr_jax.models.weights import load_weights, save_weights
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))
MESHES = [MeshConfig(1, 8, 1), MeshConfig(1, 2, 4), MeshConfig(2, 2, 2)]


def golden(name: str) -> tuple[ModelConfig, Params, list[np.ndarray], list[np.ndarray]]:
    """Configuration, weights, token sequences int32 [T] and their logits float32 [T, V]."""
    config = ModelConfig.load(GOLDEN / name)
    arrays = load_file(GOLDEN / name / "expected.safetensors")
    count = len(arrays) // 3
    tokens, logits = ([arrays[f"{what}_{i}"] for i in range(count)] for what in ("tokens", "logits"))
    return config, load_weights(GOLDEN / name, config), tokens, logits


def rows(placed: list[list[tuple[int, np.ndarray]]], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions, segments [B, width] with every row's sequences at the given columns; padding holds token 7."""
    tokens = np.full((len(placed), width), 7, np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, members in enumerate(placed):
        for segment, (start, sequence) in enumerate(members, start=1):
            end = start + len(sequence)
            tokens[row, start:end], segments[row, start:end] = sequence, segment
            positions[row, start:end] = np.arange(len(sequence))
    return tokens, positions, segments


def logits_of(config: ModelConfig, params: Params, batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    run = jax.jit(lambda p, *arrays: unembed(p, config, forward(p, config, *arrays)))
    return np.asarray(run(params, *map(jnp.asarray, batch)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_separate_padded_and_packed_rows(name):
    config, params, tokens, expected = golden(name)
    spread = max(np.abs(e).max() for e in expected)
    assert spread > 1.0, "a golden file of nearly equal logits would prove nothing"
    right = logits_of(config, params, rows([[(0, t)] for t in tokens], 16))
    left = logits_of(config, params, rows([[(16 - len(t), t)] for t in tokens], 16))
    starts = np.cumsum([0, *(len(t) for t in tokens)])
    packed = logits_of(config, params, rows([list(zip(starts, tokens))], 32))
    for i, (sequence, want) in enumerate(zip(tokens, expected, strict=True)):
        n = len(sequence)
        np.testing.assert_allclose(right[i, :n], want, atol=1e-4)
        np.testing.assert_allclose(left[i, 16 - n :], want, atol=1e-4)
        np.testing.assert_allclose(packed[0, starts[i] : starts[i] + n], want, atol=1e-4)


def test_every_family_is_here():
    assert {ModelConfig.load(GOLDEN / name).model_type for name in NAMES} == set(FAMILIES)


@cache
def sampled(name: str) -> tuple[list[Request], list[Completion]]:
    """64 tokens from every prompt through the sampler, greedily first, then with two temperatures."""
    config, params, tokens, _ = golden(name)
    tokenizer = SimpleNamespace(eos_ids=frozenset(), pad_id=0)  # ids are all the sampler needs here
    rollout = RolloutConfig(max_prompt=12, max_response=64, slots=8)
    engine = Engine(config, rollout, tokenizer, make_mesh(MeshConfig()))
    prompts = [tuple(map(int, t)) for t in tokens]
    requests = [Request(p, request_key(0, i), t) for t in (0.0, 1.0, 0.6) for i, p in enumerate(prompts)]
    return requests, engine.generate(params, requests)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_theirs(name):
    """Through the sampler: cache, windows, positions, whatever the batch."""
    arrays = load_file(GOLDEN / name / "expected.safetensors")
    for i, completion in enumerate(sampled(name)[1][: len(arrays) // 3]):
        assert list(completion.tokens) == arrays[f"greedy_{i}"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_of_the_sampler_are_the_learners(name):
    """What the ratio of the policy gradient starts from: the same number, up to rounding."""
    config, params, _, _ = golden(name)
    requests, completions = sampled(name)
    sequences = [np.append(r.prompt, c.tokens) for r, c in zip(requests, completions, strict=True)]
    logits = logits_of(config, params, rows([[(0, ids)] for ids in sequences], 80)).astype(np.float64)
    differences = []
    for row, request, completion in zip(logits, requests, completions, strict=True):
        n = len(completion.tokens)
        assert n == 64
        row = row[len(request.prompt) - 1 :][:n] / (request.temperature or 1.0)
        row -= row.max(axis=-1, keepdims=True)
        learned = row[np.arange(n), completion.tokens] - np.log(np.exp(row).sum(axis=-1))
        differences.append(np.abs(completion.logprobs - learned))
    assert np.mean(differences) < 1e-5 and np.max(differences) < 1e-4


@pytest.mark.parametrize("mesh_config", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "llama", "gemma3"])
def test_the_same_on_every_mesh(name, mesh_config):
    """And weights are really split: no device holds more than its share of the matrices that can be."""
    config, params, tokens, _ = golden(name)
    mesh = make_mesh(mesh_config)
    batch = rows([[(0, tokens[i % 4])] for i in range(8)], 16)
    sharded = jax.device_put(params, param_shardings(config, mesh))
    placed = jax.device_put(batch, row_sharding(mesh))
    got = jax.jit(lambda p, *arrays: unembed(p, config, forward(p, config, *arrays)))(sharded, *placed)
    np.testing.assert_allclose(got, logits_of(config, params, batch), rtol=1e-5, atol=1e-5)
    for weight in ("gate", "up", "down"):
        whole = sharded["blocks"][weight]
        assert whole.addressable_shards[0].data.size * mesh_config.fsdp * mesh_config.tensor == whole.size


@pytest.mark.parametrize("name", NAMES)
def test_transformers_agrees_now_and_loads_what_we_write(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params, tokens, _ = golden(name)
    save_weights(tmp_path, config, params)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = logits_of(config, params, rows([[(0, t)] for t in tokens], 16))
    for i, sequence in enumerate(tokens):
        with torch.no_grad():
            want = theirs(torch.from_numpy(sequence.astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(ours[i, : len(sequence)], want, atol=1e-4)
