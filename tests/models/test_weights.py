"""Weights in and out of Hugging Face folders: exact both ways, and every fault named."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.errors import UserError
from azr_jax.learn.state import param_shardings
from azr_jax.models.config import ModelConfig
from azr_jax.models.shards import Stored
from azr_jax.models.transformer import init_params
from azr_jax.models.weights import digests, load_weights, model_folder, pieces_of, save_weights, write_weights

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(folder.parent.name for folder in GOLDEN.glob("*/config.json"))
MESHES = {"fsdp 8": (1, 8, 1), "tensor 4 x fsdp 2": (1, 2, 4), "data 2 x fsdp 2 x tensor 2": (2, 2, 2)}
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


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_dtype_loads_as_every_dtype(folder, stored, dtype):
    edit(folder, lambda tensors: tensors.update({key: w.astype(stored) for key, w in tensors.items()}))
    tensors = load_file(folder / "model.safetensors")
    params = load_weights(folder, ModelConfig.load(folder), dtype=dtype)
    assert {str(w.dtype) for w in jax.tree.leaves(params)} == {dtype}
    for ours, theirs in (
        (params["embed"], tensors["model.embed_tokens.weight"]),
        (params["lm_head"], tensors["lm_head.weight"].T),
        (params["blocks"]["down"][1], tensors["model.layers.1.mlp.down_proj.weight"].T),
    ):
        assert theirs.dtype == stored  # and to float32 the conversion is exact
        np.testing.assert_array_equal(ours, theirs.astype(dtype))


def test_float32_from_bfloat16_and_back_is_byte_equal(folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({key: w.astype(jnp.bfloat16) for key, w in tensors.items()}))
    config, params = ModelConfig.load(folder), load(folder)
    save_weights(tmp_path / "out", config, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == tidy(folder).read_bytes()


def tidy(folder: Path) -> Path:
    """model.safetensors with the metadata that `transformers` wants."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["gemma3", "qwen2_untied"])
def test_shards_come_straight_from_the_files(name, mesh, monkeypatch):
    config = ModelConfig.load(GOLDEN / name)
    grid = make_mesh(MeshConfig(*MESHES[mesh]))
    asked: list[int] = []
    read = Stored.read

    def counted(self: Stored, index: tuple[slice, ...] = ()) -> np.ndarray:
        piece = read(self, index)
        asked.append(piece.nbytes)
        return piece

    monkeypatch.setattr(Stored, "read", counted)
    shardings = param_shardings(config, grid)
    params = load_weights(GOLDEN / name, config, shardings)
    whole = sum(math.prod(piece.shape) for piece in pieces_of(config)) * 4
    assert sum(asked) == whole, "what several devices hold is read once, and nothing is read twice"
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, params, load(GOLDEN / name))
    assert jax.tree.map(lambda w: w.sharding, params) == shardings
    big = params["blocks"]["gate"]
    parts = MESHES[mesh][1] * MESHES[mesh][2]
    assert {shard.data.nbytes for shard in big.addressable_shards} == {big.nbytes // parts}


def test_a_process_reads_its_own_shards_only(monkeypatch):
    """What one device of eight asks for: an eighth of a weight that is split over all."""
    config = ModelConfig.load(GOLDEN / "qwen3")
    shardings = param_shardings(config, make_mesh(MeshConfig(*MESHES["fsdp 8"])))
    asked: list[int] = []
    original = jax.make_array_from_callback

    def first_only(shape, sharding, read, dtype):
        index = sharding.addressable_devices_indices_map(shape)[jax.devices()[0]]
        asked.append(read(index).nbytes)
        assert asked[-1] == math.prod(sharding.shard_shape(shape)) * 4
        return original(shape, sharding, lambda i: np.zeros(sharding.shard_shape(shape), dtype), dtype=dtype)

    monkeypatch.setattr(jax, "make_array_from_callback", first_only)
    load_weights(GOLDEN / "qwen3", config, shardings)
    assert sum(asked) < config.num_params * 4 / 6


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


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", Q_PROJ, "lm_head.weight"])
def test_missing_weight_is_named(folder, key):
    edit(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"{key} is missing"):
        load(folder)


def test_unknown_weight_is_named(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": np.ones(10, np.float32)}))
    with pytest.raises(UserError, match="unknown weight model.layers.0.self_attn.q_norm.weight"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float64", "float8_e4m3fn"])
def test_a_type_that_is_not_supported_is_named(folder, dtype):
    edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(dtype)}))
    with pytest.raises(UserError, match=f"model.safetensors: weight {Q_PROJ} is of type [FI][0-9].*; supported are"):
        load(folder)


def test_known_buffers_are_ignored(folder):
    whole = load(folder)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), whole)


@pytest.mark.parametrize(
    ("old", "new", "head"),
    [("model.", "language_model.model.", "language_model.lm_head"), ("model.", "model.language_model.", "lm_head")],
)
def test_the_text_part_of_a_model_with_vision_is_loaded(tmp_path, old, new, head):
    folder = Path(shutil.copytree(GOLDEN / "gemma3", tmp_path / "model"))
    whole = load(folder)

    def nest(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new, 1)] = tensors.pop(key)
        tensors[head + ".weight"] = tensors[new + "embed_tokens.weight"]
        tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = np.ones((2, 3), np.float32)

    edit(folder, nest)
    jax.tree.map(np.testing.assert_array_equal, load(folder), whole)


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


@pytest.mark.parametrize("change", [lambda w: w + 1e-3, lambda w: w[:-1], lambda w: w.astype(np.float16)])
def test_a_tied_checkpoint_with_a_head_of_its_own_is_a_contradiction(tmp_path, change):
    folder = Path(shutil.copytree(GOLDEN / "qwen2_tied", tmp_path / "model"))
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": change(tensors["model.embed_tokens.weight"])}))
    with pytest.raises(UserError, match="lm_head.weight differs from .*tie_word_embeddings"):
        load(folder)


def test_a_value_that_its_type_cannot_hold_is_no_infinity(tmp_path):
    config = ModelConfig.load(GOLDEN / "qwen2_tied")
    dtypes = {piece.key: np.dtype(np.float16) for piece in pieces_of(config)}
    with pytest.raises(UserError, match="weight model.* has values beyond float16"):
        write_weights(tmp_path, config, dtypes, lambda piece: np.full((64, 32), 7e4, np.float32), 10**9)


PEAK = """
import sys
from pathlib import Path
import jax
from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh
from azr_jax.learn.state import param_shardings
from azr_jax.models.config import ModelConfig
from azr_jax.models.weights import load_weights

def memory(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name + ":"))

folder, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]
config = ModelConfig.load(folder)
shardings = param_shardings(config, make_mesh(MeshConfig(*sizes)))
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), jax.devices()[0]))
before = memory("VmRSS")
params = load_weights(folder, config, shardings)
held = sum(shard.data.nbytes for w in jax.tree.leaves(params) for shard in w.addressable_shards)
print(held, memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory) -> Path:
    """A random bfloat16 checkpoint of 240 MB in files of at most 60 MB."""
    folder = tmp_path_factory.mktemp("big")
    config = ModelConfig(8000, 1024, 4096, 7, 16, 4, 64)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    bfloat16, rng = np.dtype(jnp.bfloat16), np.random.default_rng(0)
    shapes = jax.tree_util.tree_map(lambda w: w.shape, jax.eval_shape(lambda: init_params(config, 0)))

    def fetch(piece):
        shape = shapes
        for name in piece.path.split("/"):
            shape = shape[name]
        return rng.integers(0, 1 << 14, shape[piece.layer is not None :], np.uint16).view(bfloat16)

    write_weights(folder, config, {piece.key: bfloat16 for piece in pieces_of(config)}, fetch, 60 * 10**6)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_peak_of_host_memory(big_folder, mesh):
    """float32 weights on eight devices whose memory is this process's own."""
    arguments = [sys.executable, "-c", PEAK, str(big_folder), *map(str, MESHES[mesh])]
    done = subprocess.run(arguments, capture_output=True, text=True, env=dict(os.environ), check=True)
    held, peak = map(int, done.stdout.split())
    assert held > 4.5e8 and peak < 1.3 * held


def test_digests_tell_models_of_the_same_shape_apart(folder):
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    before = digests(str(copy))
    assert before == digests(str(folder)) and {"config.json", "model.safetensors"} <= before.keys()
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (copy / "README.md").write_text("what is said of it")
    assert {name for name, value in digests(str(copy)).items() if value != before.get(name)} == {"model.safetensors"}


def test_model_folder_must_exist(tmp_path):
    assert model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no such folder"):
        model_folder(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-7B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("gemma-3-1b", "google/gemma-3-1b-pt"),
    ],
)
def test_the_name_of_a_size_is_no_folder_and_it_is_said_how_to_get_one(model, repository):
    folder = f"/data/{repository.partition('/')[2]}"
    with pytest.raises(UserError, match=f"`hf download {repository} --local-dir {folder}`, model={folder}"):
        model_folder(model)
