"""Weights in and out of Hugging Face folders: exact both ways, and every fault named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_jax
from safetensors.numpy import load_file, save_file

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import init_params
from azr_jax.models.weights import load_weights, model_folder, save_weights

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["qwen2_tied", "qwen2_untied"]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Path):
    return load_weights(folder, ModelConfig.load(folder))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the untied golden model that a test may break."""
    return Path(shutil.copytree(GOLDEN / "qwen2_untied", tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_survives_unchanged(name, tmp_path):
    config = ModelConfig.load(GOLDEN / name)
    save_weights(tmp_path, config, load(GOLDEN / name))
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / name, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert ModelConfig.load(tmp_path) == config


@pytest.mark.parametrize("tied", [True, False])
def test_save_load_save_is_byte_equal(tied, tmp_path):
    config = ModelConfig(64, 32, 48, 3, 4, 2, 8, tie_word_embeddings=tied)
    params = init_params(config, 0)
    save_weights(tmp_path / "a", config, params)
    loaded = load(tmp_path / "a")
    save_weights(tmp_path / "b", config, loaded)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))


def test_bfloat16_checkpoints_load_as_their_exact_float32_values(folder):
    tensors = {key: jnp.asarray(w, jnp.bfloat16) for key, w in load_file(folder / "model.safetensors").items()}
    save_jax(tensors, str(folder / "model.safetensors"))
    embed = load(folder)["embed"]
    assert embed.dtype == np.float32
    np.testing.assert_array_equal(embed, np.asarray(tensors["model.embed_tokens.weight"].astype(jnp.float32)))


def shard(folder: Path) -> list[str]:
    """Split model.safetensors in three with an index; returns the names of the shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::3]}, folder / name)
    weight_map = {key: names[i % 3] for i, key in enumerate(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_sharded_checkpoint_is_the_same_model(folder):
    whole = load(folder)
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, load(folder), whole)


def test_missing_shard_is_named(folder):
    names = shard(folder)
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=f"{names[1]}: not found"):
        load(folder)


@pytest.mark.parametrize("text", ["{torn", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_bad_index_is_named(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", Q_PROJ, "lm_head.weight"])
def test_missing_weight_is_named(folder, key):
    edit(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"{key} is missing"):
        load(folder)


def test_unknown_weight_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": np.ones(10, np.float32)}))
    with pytest.raises(UserError, match="unknown weight model.layers.0.self_attn.q_norm.weight"):
        load(folder)


def test_a_layer_more_than_the_config_has_is_not_dropped(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"unknown weight model\.layers\.1\."):
        load(folder)


@pytest.mark.parametrize(
    ("key", "reshape"),
    [
        (Q_PROJ, lambda w: w[:-1]),
        (Q_PROJ, lambda w: w.T),
        (Q_PROJ, lambda w: w.reshape(2 * w.shape[0], -1)),  # as many elements, another matrix
        ("model.layers.0.self_attn.o_proj.weight", lambda w: w.reshape(-1)),
        ("model.layers.0.self_attn.k_proj.bias", lambda w: w[None]),
        ("model.layers.1.mlp.down_proj.weight", lambda w: w.T),
        ("model.norm.weight", lambda w: w[:-1]),
        ("lm_head.weight", lambda w: w.T),
    ],
)
def test_wrong_shape_is_named(folder, key, reshape):
    edit(folder, lambda tensors: tensors.update({key: np.ascontiguousarray(reshape(tensors[key]))}))
    with pytest.raises(UserError, match=f"weight {key} has shape .*, config.json asks for"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 50_000])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors: truncated or not a safetensors file"):
        load(folder)


def test_missing_file_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: not found"):
        load(folder)


def test_a_tied_checkpoint_may_carry_its_head_twice(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen2_tied", tmp_path / "model"))
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head" not in load(folder)


def test_model_folder_must_exist(tmp_path):
    assert model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no such folder"):
        model_folder(str(tmp_path / "nothing"))
