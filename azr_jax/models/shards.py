"""The safetensors files of a Hugging Face folder: one, or several with an index, read and written piece by piece.

Reading copies only the slice that is asked for; a file is opened for one read and closed, so that pages of it never
pile up in this process. Writing lays out all files first and then fills them in any order, one tensor at a time: no
more than one tensor is in memory. What this does not know: which tensors a model has (weights.py).

The format is a length (8 bytes, little-endian), a JSON header of that length, the tensors one after another
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from azr_jax.errors import UserError
from azr_jax.models.layout import Index, Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Types of weights that are read and written, by their names in the format.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor of a checkpoint: its file, its key there, its shape, its type as the format names it."""

    file: Path
    key: str
    shape: Shape
    type: str

    def read(self, index: Index = ()) -> np.ndarray:
        """This part of it (all of it by default), in its own dtype. Only types of DTYPES can be read."""
        with _opened(self.file) as tensors:
            return tensors.get_slice(self.key)[index] if index else tensors.get_tensor(self.key)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by key; only headers are read. As `transformers`, one file goes before an index.

    UserError: a file is missing, truncated or no safetensors file; the index is no JSON object with a `weight_map`.
    """
    weight_map = _weight_map(folder)
    found: dict[str, Stored] = {}
    for file in sorted({folder / name for name in weight_map.values()}) or [folder / SINGLE]:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if weight_map.get(key, file.name) == file.name:
                    part = tensors.get_slice(key)
                    found[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
    for key, name in weight_map.items():
        if key not in found:
            raise UserError(
                f"{folder / name}: weight {key} is not in it, though {INDEX} says so; copy the folder again"
            )
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    """Key -> file name, of files that exist; empty where a single file holds everything."""
    single, path = folder / SINGLE, folder / INDEX
    if single.exists():
        return {}
    if not path.exists():
        pickled = next(folder.glob("*.bin"), None)
        hint = f"; {pickled.name} is a pickle and never read, convert it to safetensors" if pickled else ""
        raise UserError(f"{single}: not found, and no {INDEX} either{hint}")
    try:
        weight_map = dict(json.loads(path.read_text())["weight_map"])
        for name in weight_map.values():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file name")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: not an index of weights: {type(error).__name__}: {error}") from None
    if not weight_map:
        raise UserError(f"{path}: not an index of weights: it names none")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: not found, though {INDEX} names it; the checkpoint is incomplete")
    return weight_map


def _opened(file: Path) -> Any:
    """A context manager. Opening checks the header against the size of the file."""
    try:
        return safe_open(str(file), framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy it here again") from None


class ShardWriter:
    """Writes a checkpoint; a context manager. Each tensor announced must be written once, in any order.

    Files are named as `transformers` names them, with an index if there are several.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[Shape, np.dtype]], max_bytes: int) -> None:
        """folder: exists. tensors: shape and dtype by key, split over files in this order; a file has at most
        `max_bytes`, unless a single tensor is larger.
        """
        self.size = sum(_nbytes(*tensor) for tensor in tensors.values())
        self._tensors = dict(tensors)
        self._place: dict[str, tuple[BinaryIO, int]] = {}
        self._stack = ExitStack()
        groups = _split(tensors, max_bytes)
        self.names = [SINGLE]
        if len(groups) > 1:
            self.names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
            weight_map = {key: name for name, keys in zip(self.names, groups, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, keys in zip(self.names, groups, strict=True):
            self._begin(self._stack.enter_context(open(folder / name, "wb")), keys)

    def _begin(self, file: BinaryIO, keys: list[str]) -> None:
        """Write the header. Tensors of wide types first, so that each is aligned, then by name, as the library does."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key in sorted(keys, key=lambda key: (-self._tensors[key][1].itemsize, key)):
            shape, dtype = self._tensors[key]
            end = offset + _nbytes(shape, dtype)
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + offset)
        self._place |= {key: (file, start + header[key]["data_offsets"][0]) for key in keys}

    def write(self, key: str, tensor: np.ndarray) -> None:
        """Write one tensor, of the shape and dtype announced."""
        assert (tensor.shape, tensor.dtype) == self._tensors[key], (key, tensor.shape, tensor.dtype)
        file, offset = self._place.pop(key)
        file.seek(offset)
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._stack.close()
        assert kind is not None or not self._place, f"never written: {sorted(self._place)}"


def _nbytes(shape: Shape, dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(tensors: Mapping[str, tuple[Shape, np.dtype]], max_bytes: int) -> list[list[str]]:
    """Keys of each file, in order, counting what a header takes (generously) too."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        need = _nbytes(*tensor) + len(key.encode()) + 160
        if groups[-1] and size + need > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += need
    return groups
