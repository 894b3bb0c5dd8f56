"""Weights in and out of Hugging Face folders (safetensors), through the two-way tables of `families`.

Every key of the checkpoint must be known and every weight of the model present with the right shape: a mismatch is an
error that names the key, never a silently random weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.families import weight_table
from azr_jax.models.transformer import Params, Spec, param_specs

EMBEDDED = Path(__file__).parent / "embedded"


def model_folder(model: str) -> Path:
    """The folder a config's `model` names: `embedded`, or a path. Raises UserError if it is not a folder."""
    folder = EMBEDDED if model == "embedded" else Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model {model!r}: no such folder; give `embedded` or the path of a Hugging Face folder "
            "(config.json, *.safetensors, tokenizer)"
        )
    return folder


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    try:
        if index.exists():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index}: not an index of weights: {type(error).__name__}: {error}") from None
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: not found; the folder needs model.safetensors or all files of its index")
    return files


def load_weights(folder: Path, config: ModelConfig) -> Params:
    """float32 numpy weights, nested as `param_specs`. Raises UserError naming the file or key that is wrong."""
    raw: dict[str, np.ndarray] = {}
    for file in _shards(folder):
        try:
            with safe_open(str(file), framework="flax") as tensors:  # reads bfloat16 too, which numpy cannot
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    raw[key] = np.asarray(tensors.get_tensor(key), np.float32)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy it here again") from None
    if config.tie_word_embeddings:
        raw.pop("lm_head.weight", None)
    table = weight_table(config)

    def take(path: str, spec: Spec) -> np.ndarray:
        row = table[path]
        stacked = "{layer}" in row.key
        keys = [row.key.format(layer=i) for i in range(config.num_layers)] if stacked else [row.key]
        parts = []
        for key in keys:
            if key not in raw:
                raise UserError(f"{folder}: weight {key} is missing from the checkpoint")
            shape = row.to_theirs(np.empty(spec.shape[1:] if stacked else spec.shape, np.bool_)).shape
            if raw[key].shape != shape:
                raise UserError(f"{folder}: weight {key} has shape {raw[key].shape}, config.json asks for {shape}")
            parts.append(row.to_ours(raw.pop(key)))
        return np.stack(parts) if stacked else parts[0]

    params = _map_specs(param_specs(config), take)
    if raw:
        raise UserError(f"{folder}: unknown weight {sorted(raw)[0]} ({len(raw)} in all); the family may differ")
    return params


def _map_specs(specs: dict[str, Any], leaf: Any, prefix: str = "") -> dict[str, Any]:
    return {
        name: leaf(prefix + name, spec) if isinstance(spec, Spec) else _map_specs(spec, leaf, f"{prefix}{name}/")
        for name, spec in specs.items()
    }


def save_weights(folder: Path, config: ModelConfig, params: Params) -> None:
    """Write config.json and model.safetensors (float32), loadable by `transformers`."""
    tensors: dict[str, np.ndarray] = {}
    table = weight_table(config)

    def put(path: str, weight: np.ndarray) -> None:
        row = table[path]
        if "{layer}" in row.key:
            for i, part in enumerate(weight):
                tensors[row.key.format(layer=i)] = np.ascontiguousarray(row.to_theirs(part))
        else:
            tensors[row.key] = np.ascontiguousarray(row.to_theirs(weight))

    for path, weight in jax.tree_util.tree_flatten_with_path(params)[0]:
        put("/".join(key.key for key in path), np.asarray(weight, np.float32))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
