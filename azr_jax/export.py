"""`azr-jax export`: weights of a run, of one checkpoint or of a Hugging Face folder, as a Hugging Face folder.

The new folder is the source folder with other weights: config.json keeps every field that training cannot change,
tokenizer, chat template, generation settings and licence are copied. `transformers` loads it unchanged. One weight is
in memory at a time (of a run: all layers of it, in float32). A checkpoint is never exchanged for an older one, as a
resume would do: what cannot be read is an error.

Not here: merging or quantizing, uploading, and the optimizer's state.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import SingleDeviceSharding

from azr_jax.checkpoint import BEST_BY, Checkpointer, best_step
from azr_jax.errors import UserError
from azr_jax.models.config import ARCHITECTURES, ModelConfig
from azr_jax.models.families import weight_table
from azr_jax.models.shards import DTYPES, Stored
from azr_jax.models.transformer import Spec, param_specs
from azr_jax.models.weights import Piece, model_folder, pieces_of, stored_weights, write_weights
from azr_jax.shelf import STEP_NAME
from azr_jax.telemetry.run_folder import read_rows

log = logging.getLogger(__name__)

#: Copied as they are, where they exist: what a tokenizer may consist of, and the terms a model comes with.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: Fields of a config.json that belong into a generation_config.json too.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Source:
    """Where weights come from: `folder` is the Hugging Face folder, `checkpoint` (of a run) goes before its weights."""

    folder: Path
    checkpoints: Checkpointer | None = None
    step: int | None = None

    def __str__(self) -> str:
        return str(self.folder if self.checkpoints is None or self.step is None else self.checkpoints.path(self.step))


def export_command(args: Namespace) -> int:
    """`azr-jax export`; returns the exit code. `args` are those of the command line (cli.py)."""
    report = export(args.source, Path(args.out), args.dtype, int(args.max_shard_gb * 1e9), args.step)
    if args.json:
        text = json.dumps(report)
    else:
        size = f"{report['parameters'] / 1e6:,.1f} M parameters, {report['bytes'] / 1e6:,.1f} MB, {report['dtype']}"
        text = f"{report['out']}: {len(report['files'])} weight file(s), {size}, from {report['source']}"
    sys.stdout.write(text + "\n")
    return 0


def export(source: str, out: Path, dtype: str, max_bytes: int, step: int | str | None = None) -> dict[str, Any]:
    """Write `out`; returns what `--json` prints.

    source: a run folder, a checkpoint in it, a Hugging Face folder or `embedded`. dtype: "as-loaded" (of every tensor
    the type it has in the Hugging Face folder), "bfloat16" or "float32". step: of a run; None is the newest, "best" the
    one with the highest BEST_BY among those that were evaluated.
    UserError: nothing to export, `out` is in the way, too little space, a damaged source.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder; give a new one with --out", exit_code=2)
    found = find_source(source, step)
    config = ModelConfig.load(found.folder)
    fields = text_fields(found.folder, config)
    stored = stored_weights(found.folder, config)
    dtypes = {key: DTYPES[tensor.type] if dtype == "as-loaded" else np.dtype(dtype) for key, tensor in stored.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        need = sum(math.prod(piece.shape) * dtypes[piece.key].itemsize for piece in pieces_of(config))
        if shutil.disk_usage(out).free < need:
            raise UserError(f"{out}: {need / 1e9:.1f} GB are needed and the disk has less; free some, or go elsewhere")
        with TemporaryDirectory(prefix=".export-", dir=out) as name:
            temporary = Path(name)
            fetch = _from_run(found, config) if found.checkpoints else _from_folder(config, stored)
            writer = write_weights(temporary, config, dtypes, fetch, max_bytes)
            _copy_rest(found.folder, temporary, fields)
            if dtype != "as-loaded":
                names = [key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype"]
                fields |= dict.fromkeys(names, dtype)
            (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, out / file.name)  # the config last: until then it is no model folder
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    kinds = sorted({str(dtype) for dtype in dtypes.values()})
    return {
        "out": str(out),
        "source": str(found),
        "model": str(found.folder),
        "step": found.step,
        "files": writer.names,
        "bytes": writer.size,
        "parameters": config.num_params,
        "dtype": ", ".join(kinds),
    }


def find_source(source: str, step: int | str | None) -> Source:
    """What `source` names. UserError if it is nothing to export, or the run's model folder is gone."""
    path = Path(source).expanduser()
    if source == "embedded" or (path / "config.json").exists():
        if step is not None:
            raise UserError(f"--step: {source} is no run folder, its weights have no steps", exit_code=2)
        return Source(model_folder(source))
    named = STEP_NAME.fullmatch(path.name)
    run = path.parent.parent if named else path.parent if path.name == "checkpoints" else path
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{source}: neither a run folder (config.yaml), a checkpoint in one (checkpoints/step_000010) nor a "
            "Hugging Face folder (config.json)",
            exit_code=2,
        )
    if named and step not in (None, int(named.group(1))):
        raise UserError(f"--step {step}: {source} is the checkpoint of step {int(named.group(1))}", exit_code=2)
    checkpoints = Checkpointer(run / "checkpoints", keep=1)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{run} holds no checkpoint yet")
    if step == "best":
        rows = read_rows(run / "metrics.jsonl")
        step = best_step({row["step"]: row[BEST_BY] for row in rows if row.get(BEST_BY) is not None}, steps)
        if step is None:
            raise UserError(f"--step best: no checkpoint of {run} was evaluated ({BEST_BY}; see eval.every)")
    chosen = int(named.group(1)) if named else steps[-1] if step is None else step
    if chosen not in steps:
        raise UserError(f"{run} holds no checkpoint of step {chosen}; it has {', '.join(map(str, steps))}", exit_code=2)
    return Source(_model_of(run), checkpoints, chosen)


def _model_of(run: Path) -> Path:
    """The folder of the model that a run started with."""
    path = run / "config.yaml"
    try:
        model = yaml.safe_load(path.read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: does not say which model the run started with: {error}") from None
    try:
        return model_folder(str(model))
    except UserError:
        raise UserError(
            f"{path}: the run started with model {str(model)!r}, and there is no such folder (any more, or from here); "
            "its config.json and tokenizer are needed: put it back, or start from the folder where the run did"
        ) from None


def text_fields(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The config.json of the language model: of one with a vision part, which is left out, its text section."""
    fields = json.loads((folder / "config.json").read_text())
    if not isinstance(fields.get("text_config"), dict):
        return fields
    kept = {key: fields[key] for key in (*SPECIAL_TOKENS, "dtype", "torch_dtype") if key in fields}
    named = {"architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type}
    return kept | fields["text_config"] | named


def _copy_rest(folder: Path, out: Path, fields: Mapping[str, Any]) -> None:
    """Tokenizer, generation settings and licence."""
    for pattern in COPIED:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                target = out / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    if not any((out / name).exists() for name in TOKENIZERS):
        log.warning("%s has no tokenizer: the exported folder has none either", folder)
    special = {key: fields[key] for key in SPECIAL_TOKENS if fields.get(key) is not None}
    if special and not (out / "generation_config.json").exists():
        (out / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


def _from_folder(config: ModelConfig, stored: Mapping[str, Stored]) -> Callable[[Piece], np.ndarray]:
    table = weight_table(config)
    return lambda piece: table[piece.path].to_ours(stored[piece.key].read())


def _from_run(source: Source, config: ModelConfig) -> Callable[[Piece], np.ndarray]:
    """Restores one weight after the other, each with all its layers."""
    checkpoints, step, sharding = source.checkpoints, source.step, SingleDeviceSharding(jax.local_devices()[0])
    assert checkpoints is not None and step is not None
    held: dict[str, np.ndarray] = {}

    def fetch(piece: Piece) -> np.ndarray:
        if piece.path not in held:
            held.clear()
            names = piece.path.split("/")
            spec: Any = param_specs(config)
            for name in names:
                spec = spec[name]
            assert isinstance(spec, Spec)
            part: Any = jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=sharding)
            for name in (*reversed(names), "params"):
                part = {name: part}
            (weight,) = jax.tree.leaves(checkpoints.restore_part(step, part))
            held[piece.path] = np.asarray(weight)
        weight = held[piece.path]
        return weight if piece.layer is None else weight[piece.layer]

    return fetch
