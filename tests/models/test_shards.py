"""Files of a checkpoint: byte for byte as the library writes them, split within the limit, read in parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from azr_jax.errors import UserError
from azr_jax.models.shards import DTYPES, ShardWriter, stored_tensors

F32, BF16 = DTYPES["F32"], DTYPES["BF16"]


def tensors(dtype: np.dtype = F32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(7, 5 + i)).astype(dtype) for i, name in enumerate(("b", "a", "layer.10", "layer.9"))}


def write(folder: Path, content: dict[str, np.ndarray], max_bytes: int = 10**9) -> ShardWriter:
    announced = {key: (tensor.shape, tensor.dtype) for key, tensor in content.items()}
    with ShardWriter(folder, announced, max_bytes) as writer:
        for key in sorted(content, reverse=True):  # any order will do
            writer.write(key, content[key])
    return writer


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_single_file_is_what_the_library_writes(dtype, tmp_path):
    content = tensors(dtype)
    write(tmp_path, content)
    save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_mixed_types_stay_aligned(tmp_path):
    content = {"odd": np.ones(3, BF16), "wide": np.arange(4, dtype=np.float32), "half": np.ones(5, np.float16)}
    write(tmp_path, content)
    loaded = load_file(tmp_path / "model.safetensors")
    for key, tensor in content.items():
        assert loaded[key].dtype == tensor.dtype
        np.testing.assert_array_equal(loaded[key], tensor)


@pytest.mark.parametrize("max_bytes", [1, 600, 900])
def test_files_stay_below_the_limit(max_bytes, tmp_path):
    content = tensors()
    writer = write(tmp_path, content, max_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == content.keys() and set(index["weight_map"].values()) == set(writer.names)
    assert index["metadata"]["total_size"] == writer.size == sum(tensor.nbytes for tensor in content.values())
    for name in writer.names:
        assert len(load_file(tmp_path / name)) == 1 or (tmp_path / name).stat().st_size <= max_bytes
    for key, stored in stored_tensors(tmp_path).items():
        assert (stored.shape, stored.type) == (content[key].shape, "F32")
        np.testing.assert_array_equal(stored.read(), content[key])
        np.testing.assert_array_equal(stored.read((slice(2, 5), slice(1, 3))), content[key][2:5, 1:3])


def test_a_tensor_that_was_never_written_is_no_success(tmp_path):
    with pytest.raises(AssertionError, match="never written"), ShardWriter(tmp_path, {"a": ((1,), F32)}, 100):
        pass


def sharded(folder: Path) -> dict[str, str]:
    write(folder, tensors(), 600)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_single_file_goes_before_an_index(tmp_path):
    sharded(tmp_path)
    write(tmp_path, {"only": np.zeros(2, np.float32)})
    assert stored_tensors(tmp_path).keys() == {"only"}


def test_the_index_decides_between_two_copies_of_a_key(tmp_path):
    weight_map = sharded(tmp_path)
    path = tmp_path / weight_map["b"]
    other = tensors()[next(key for key in weight_map if weight_map[key] != weight_map["b"])]
    (key,) = (key for key in weight_map if np.array_equal(tensors()[key], other))
    save_file(load_file(path) | {key: other + 1}, path)
    np.testing.assert_array_equal(stored_tensors(tmp_path)[key].read(), other)


def test_a_key_that_its_file_does_not_hold_is_named(tmp_path):
    weight_map = sharded(tmp_path)
    index = {"weight_map": weight_map | {"ghost": weight_map["a"]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{weight_map['a']}: weight ghost is not in it"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "text", ["{torn", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_bad_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="model.safetensors.index.json: not an index of weights"):
        stored_tensors(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="is no file name"):
        stored_tensors(tmp_path)


def test_pickled_weights_are_named_and_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle and never read"):
        stored_tensors(tmp_path)
