"""Weights in and out of Hugging Face folders (safetensors), through the two-way tables of `families`.

Loading goes from the file to the devices that hold a weight: each process reads the slices of its own shards and
nothing else, and the host never holds more than one weight beside what is already placed. Every key of the checkpoint
must be known and every weight of the model present with the right shape: a mismatch is an error that names the key,
never a silently random weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.families import text_key, weight_table
from azr_jax.models.layout import Index, Row, Shape
from azr_jax.models.shards import DTYPES, ShardWriter, Stored, stored_tensors
from azr_jax.models.sizes import SIZES, hub_name
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
#: Of the beginning and of the end of a file. A safetensors file begins with the names and places of its tensors.
END_BYTES = 1 << 20


def model_folder(model: str) -> Path:
    """The folder a config's `model` names: `embedded`, or a path. Raises UserError if it is not a folder."""
    folder = EMBEDDED if model == "embedded" else Path(model).expanduser()
    if not folder.is_dir():
        if model.lower() in SIZES:
            hub = hub_name(model.lower())
            here = f"/data/{hub.partition('/')[2]}"
            raise UserError(
                f"model {model!r} names a published size, which `azr-jax plan` knows without weights; all else needs "
                "the folder of a checkpoint (config.json, *.safetensors, tokenizer). Get it where there is room, here "
                f"and on every other host, and give its path: `hf download {hub} --local-dir {here}`, model={here}",
                exit_code=2,
            )
        raise UserError(
            f"model {model!r}: no such folder; give `embedded` or the path of a Hugging Face folder "
            "(config.json, *.safetensors, tokenizer)",
            exit_code=2,
        )
    return folder


def digests(model: str) -> dict[str, str]:
    """File of a model -> what tells it from another one there: all of a small file, size and both ends of a large one.

    Seconds, where reading 15 GB takes minutes; several hosts compare it before they compute with different weights.
    """
    found = {}
    for path in sorted(model_folder(model).iterdir()):
        if path.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt"} and path.is_file():
            size, digest = path.stat().st_size, hashlib.sha256()
            with path.open("rb") as file:
                for start in (0, max(0, size - END_BYTES)):
                    file.seek(start)
                    digest.update(file.read(END_BYTES))
            found[path.name] = f"{digest.hexdigest()[:16]} ({size} bytes)"
    return found


class Piece(NamedTuple):
    """A tensor of a checkpoint: its key there, its shape there, and where it is here (`layer` of a stacked weight)."""

    key: str
    shape: Shape
    path: str
    layer: int | None


def pieces_of(config: ModelConfig) -> list[Piece]:
    """All tensors of a checkpoint of this model, in the order in which they are computed with."""
    table = weight_table(config)
    ends, block = {}, []
    for path, spec in _flat(param_specs(config)).items():
        row = table[path]
        if row.stacked:
            block.append(Piece(row.key, row.their_shape(spec.shape[1:]), path, None))
        else:
            ends[path] = Piece(row.key, row.their_shape(spec.shape), path, None)
    first = ends.pop("embed")
    layers = [part._replace(key=part.key.format(layer=i), layer=i) for i in range(config.num_layers) for part in block]
    return [first, *layers, *ends.values()]


def stored_weights(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a checkpoint by the key that the family's table has for them; only headers are read.

    Raises UserError naming the file or key that is wrong: missing, unknown, of a wrong shape or an unsupported type.
    """
    found, left_out = {}, 0
    for raw, stored in stored_tensors(folder).items():
        key = text_key(raw)
        left_out += key is None
        if key is not None and not key.endswith(IGNORED):
            found[key] = stored
    for key, stored in sorted(found.items()):
        if stored.type not in DTYPES:
            raise UserError(f"{stored.file}: weight {key} is of type {stored.type}; supported are {', '.join(DTYPES)}")
    wanted = pieces_of(config)
    for piece in wanted:
        if piece.key not in found:
            raise UserError(f"{folder}: weight {piece.key} is missing from the checkpoint")
        shape = found[piece.key].shape
        if shape != piece.shape:
            raise UserError(f"{folder}: weight {piece.key} has shape {shape}, config.json asks for {piece.shape}")
    if config.tie_word_embeddings and HEAD in found:
        _check_tied(found.pop(HEAD), found[wanted[0].key])
    unknown = sorted(found.keys() - {piece.key for piece in wanted})
    if unknown:
        raise UserError(f"{folder}: unknown weight {unknown[0]} ({len(unknown)} in all); the family may differ")
    if left_out:
        log.info("%s: a text model with a vision part, of which %d tensors are left out", folder, left_out)
    return found


def load_weights(folder: Path, config: ModelConfig, shardings: Any = None, dtype: Any = jnp.float32) -> Params:
    """The weights of a checkpoint, nested as `param_specs`, all of one floating dtype.

    shardings: nested as `param_specs` (`learn.state.param_shardings`), and every process calls this; None leaves numpy
    arrays in host memory. float32 from a bfloat16 or float16 checkpoint is exact. Raises UserError as `stored_weights`.
    """
    stored, table, specs = stored_weights(folder, config), weight_table(config), param_specs(config)
    shapes = {path: spec.shape for path, spec in _flat(specs).items()}
    targets = _flat(shardings) if shardings is not None else {}
    weights: dict[str, Any] = {}
    for path in sorted(shapes, key=lambda path: -math.prod(shapes[path])):
        # Largest first: where devices share the host's memory a weight may exist twice for a moment, and then little
        # else is there yet.
        shape = shapes[path]
        read = _reader(table[path], stored, shape, np.dtype(dtype))
        if shardings is None:
            weights[path] = read((slice(None),) * len(shape))
        else:
            weights[path] = jax.make_array_from_callback(shape, targets[path], read, dtype=dtype).block_until_ready()
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=_is_spec), [weights[path] for path in shapes])


def save_weights(folder: Path, config: ModelConfig, params: Params) -> None:
    """Write config.json and safetensors in the dtype of the weights, loadable by `transformers`."""
    weights = _flat(params)
    folder.mkdir(parents=True, exist_ok=True)
    fields = config.to_hf() | {"torch_dtype": str(weights["embed"].dtype)}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    dtypes = {piece.key: np.dtype(weights[piece.path].dtype) for piece in pieces_of(config)}

    def fetch(piece: Piece) -> np.ndarray:
        weight = weights[piece.path]
        return np.asarray(weight if piece.layer is None else weight[piece.layer])

    write_weights(folder, config, dtypes, fetch)


def write_weights(
    folder: Path,
    config: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    fetch: Callable[[Piece], np.ndarray],
    max_bytes: int = MAX_SHARD_BYTES,
) -> ShardWriter:
    """Write the safetensors files into `folder`, holding one tensor at a time; the closed writer knows what it wrote.

    dtypes: of each tensor, by key. fetch: one tensor in our layout, any float dtype; asked for weight by weight, all
    layers of one before the next. Raises UserError where a value does not fit its type.
    """
    table, pieces = weight_table(config), pieces_of(config)
    with ShardWriter(folder, {piece.key: (piece.shape, dtypes[piece.key]) for piece in pieces}, max_bytes) as writer:
        for piece in sorted(pieces, key=lambda piece: piece.path):
            weight = table[piece.path].to_theirs(fetch(piece))
            with np.errstate(over="ignore"):
                tensor = weight.astype(dtypes[piece.key], copy=False)
            if tensor.dtype == np.float16 and (np.isinf(tensor) & ~np.isinf(weight)).any():
                raise UserError(f"weight {piece.key} has values beyond float16; export as bfloat16 or float32")
            writer.write(piece.key, tensor)
    return writer


def _reader(
    row: Row, stored: Mapping[str, Stored], shape: Shape, dtype: np.dtype
) -> Callable[[Index | None], np.ndarray]:
    """Reads parts of one of our weights; what several devices hold is read once."""
    done: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def fill(out: np.ndarray, key: str, index: Index, shape: Shape) -> None:
        cut = row.cut(index, shape)
        row.fill(out, stored[key].read(cut.read), cut)

    def read(index: Index | None) -> np.ndarray:
        assert index is not None  # every weight has axes
        ranges = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if ranges not in done:
            out = _aligned([stop - start for start, stop, _ in ranges], dtype)
            if row.stacked:
                for place, layer in enumerate(range(*ranges[0])):
                    fill(out[place], row.key.format(layer=layer), index[1:], shape[1:])
            else:
                fill(out, row.key, index, shape)
            done[ranges] = out
        return done[ranges]

    return read


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA on CPU takes over as it is; those that do not begin at 64 bytes it copies."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_tied(head: Stored, embedding: Stored) -> None:
    """A tied model that brings a head of its own is no tied model."""
    size = head.shape[0]
    rows = max(1, COMPARED_AT_ONCE // math.prod(head.shape[1:]))
    parts = [(slice(start, min(start + rows, size)),) for start in range(0, size, rows)]
    if (head.shape, head.type) != (embedding.shape, embedding.type) or not all(
        np.array_equal(head.read(part).view(np.uint8), embedding.read(part).view(np.uint8)) for part in parts
    ):
        raise UserError(
            f"{head.file}: {HEAD} differs from {embedding.key}, but config.json says tie_word_embeddings; "
            "set that to false, or remove the head"
        )


def _flat(tree: Any) -> dict[str, Any]:
    """{"blocks/q": leaf, ...} of weights, Specs or shardings nested as `param_specs`, in the order of jax.tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_spec)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def _is_spec(node: object) -> bool:
    return isinstance(node, Spec)
