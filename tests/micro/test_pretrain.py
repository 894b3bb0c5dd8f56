"""Rebuilding the embedded model: a complete folder, the same for the same seed, better with training."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest

from azr_jax.errors import UserError
from azr_jax.micro import pretrain
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.weights import EMBEDDED, load_weights


@pytest.fixture(scope="module", autouse=True)
def small() -> None:
    """Two thin layers: the pipeline is tested, not the recipe."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain, "POOL", 60)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "head_dim": 8}
    full = pretrain.embedded_config

    def thin(vocab_size: int) -> ModelConfig:
        from dataclasses import replace

        return replace(full(vocab_size), **shape)

    patch.setattr(pretrain, "embedded_config", thin)
    yield  # type: ignore[misc]
    patch.undo()


def rebuild(folder: Path, seed: int = 0, updates: int = 4) -> dict:
    assert pretrain.pretrain_command(Namespace(out=str(folder), updates=updates, seed=seed)) == 0
    return load_weights(folder, ModelConfig.load(folder))


def test_same_seed_same_weights(tmp_path: Path) -> None:
    first, second = rebuild(tmp_path / "a"), rebuild(tmp_path / "b")
    other = rebuild(tmp_path / "c", seed=1)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert not np.array_equal(first["embed"], other["embed"])
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", "generation_config.json"}


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    rebuild(tmp_path / "a", updates=1)
    tokenizer = load_tokenizer(tmp_path / "a")
    config = ModelConfig.load(tmp_path / "a")
    rows = next(pretrain.batches(tokenizer, seed=9))
    losses = [
        float(pretrain.loss_fn(rebuild(tmp_path / str(updates), updates=updates), config, rows)) for updates in (1, 60)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_the_shipped_tokenizer_is_the_one_the_command_makes(tmp_path: Path) -> None:
    rebuild(tmp_path / "a", updates=1)
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (EMBEDDED / "tokenizer.model").read_bytes()


def test_the_shipped_model_is_small_and_complete() -> None:
    files = [path for path in EMBEDDED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in files}
    config = ModelConfig.load(EMBEDDED)
    assert config.num_params == sum(w.size for w in jax.tree.leaves(load_weights(EMBEDDED, config)))
    assert 500_000 <= config.num_params <= 3_000_000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        pretrain.pretrain_command(Namespace(out=str(tmp_path / "file"), updates=1, seed=0))
