"""Weights in and out of Hugging Face folders (safetensors), through the two-way tables of `families`.

Loading goes from the file to the devices that hold a weight: each process reads the slices of its own shards and
nothing else, and the host never holds more than one weight beside what is already placed. Every key of the checkpoint
must be known and every weight of the model present with the right shape: a mismatch is an error that names the key,
never a silently random weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.families import text_key, weight_table
from azr_jax.models.layout import Index, Row, Shape
from azr_jax.models.shards import DTYPES, ShardWriter, Stored, stored_tensors
from azr_jax.models.transformer import Params, Spec, param_specs

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "embedded"
#: Where a tied model may repeat its embedding.
HEAD = "lm_head.weight"
#: Buffers that old checkpoints store although the config determines them.
IGNORED = ("rotary_emb.inv_freq",)
#: Most bytes of a file, as decimal gigabytes are counted; what `transformers` splits at too.
MAX_SHARD_BYTES = 5 * 10**9
COMPARED_AT_ONCE = 1 << 26


def model_folder(model: str) -> Path:
    """The folder a config's `model` names: `embedded`, or a path. Raises UserError if it is not a folder."""
    folder = EMBEDDED if model == "embedded" else Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model {model!r}: no such folder; give `embedded` or the path of a Hugging Face folder "
            "(config.json, *.safetensors, tokenizer)"
        )
    return folder


class Piece(NamedTuple):
    """A tensor of a checkpoint: its key there, its shape there, and where it is here (`layer` of a stacked weight)."""

    key: str
    shape: Shape
    path: str
    layer: int | None


def pieces_of(config: ModelConfig) -> list[Piece]:
    """All tensors of a checkpoint of this model, in the order in which they are computed with."""
    table = weight_table(config)
    pieces, blocks = [], []
    for path, spec in _flat_specs(config).items():
        row = table[path]
        if row.stacked:
            blocks.append((row, path, row.their_shape(spec.shape[1:])))
        else:
            pieces.append(Piece(row.key, row.their_shape(spec.shape), path, None))
    layers = [Piece(row.key.format(layer=i), shape, path, i) for i in range(config.num_layers) for row, path, shape in blocks]
    return [*pieces[:1], *layers, *pieces[1:]]


def load_weights(
    folder: Path, config: ModelConfig, shardings: Any = None, dtype: Any = jnp.float32
) -> Params:
    """The weights of a checkpoint, nested as `param_specs`, in one floating dtype.

    shardings: nested as `param_specs` (`learn.state.param_shardings`); None puts everything on one device.
    dtype: bfloat16 and float16 checkpoints become their exact float32 values. With several processes each calls this.
    Raises UserError naming the file or key that is wrong, before anything is read.
    """
    stored, table = stored_weights(folder, config), weight_table(config)
    specs = _flat_specs(config)
    treedef = jax.tree.structure(_map_specs(param_specs(config), lambda path, spec: path))
    whole = SingleDeviceSharding(jax.local_devices()[0])
    targets = treedef.flatten_up_to(shardings) if shardings is not None else [whole] * len(specs)
    places = dict(zip(_sorted_paths(config), targets, strict=True))
    weights: dict[str, jax.Array] = {}
    for path in sorted(specs, key=lambda path: -math.prod(specs[path].shape)):
        # Largest first: a weight is held twice while it goes to its devices, and then little else is there yet.
        read = _reader(table[path], stored, specs[path].shape, np.dtype(dtype))
        weights[path] = jax.make_array_from_callback(specs[path].shape, places[path], read).block_until_ready()
    return _map_specs(param_specs(config), lambda path, spec: weights[path])
