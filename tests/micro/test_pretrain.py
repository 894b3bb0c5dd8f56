"""Rebuilding the embedded model: a complete folder, the same for the same seed, better with training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from azr_jax.errors import UserError
from azr_jax.micro import pretrain
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.transformer import init_params
from azr_jax.models.weights import EMBEDDED, load_weights


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Two thin layers: the pipeline is tested, not the recipe."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain, "POOL", 60)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "head_dim": 8}
    full = pretrain.embedded_config

    def thin(vocab_size: int) -> ModelConfig:
        return replace(full(vocab_size), **shape)

    patch.setattr(pretrain, "embedded_config", thin)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def rebuilt(small: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders made by the command: "a" and "b" with the same arguments."""
    parent = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (parent / name).exists():
            assert (
                pretrain.pretrain_command(Namespace(out=str(parent / name), updates=60, seed=0, overwrite=False)) == 0
            )
        return parent / name

    return folder


def test_same_seed_same_weights(rebuilt: Callable[[str], Path]) -> None:
    first, second = (load_weights(rebuilt(name), ModelConfig.load(rebuilt(name))) for name in "ab")
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    tokenizer = load_tokenizer(rebuilt("a"))
    rows = [next(pretrain.batches(tokenizer, seed)).tokens for seed in (0, 0, 1)]
    assert (rows[0] == rows[1]).all() and not np.array_equal(rows[0], rows[2])
    names = {path.name for path in rebuilt("a").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", "generation_config.json"}


def test_training_lowers_the_loss(rebuilt: Callable[[str], Path]) -> None:
    config = ModelConfig.load(rebuilt("a"))
    rows = next(pretrain.batches(load_tokenizer(rebuilt("a")), seed=9))
    before = float(pretrain.loss_fn(init_params(config, 0), config, rows))
    after = float(pretrain.loss_fn(load_weights(rebuilt("a"), config), config, rows))
    assert after < 0.8 * before


def test_the_shipped_tokenizer_is_the_one_the_command_makes(rebuilt: Callable[[str], Path]) -> None:
    assert (rebuilt("a") / "tokenizer.model").read_bytes() == (EMBEDDED / "tokenizer.model").read_bytes()


def test_the_shipped_model_is_small_and_complete() -> None:
    files = [path for path in EMBEDDED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in files}
    config = ModelConfig.load(EMBEDDED)
    assert config.num_params == sum(w.size for w in jax.tree.leaves(load_weights(EMBEDDED, config)))
    assert 500_000 <= config.num_params <= 3_000_000


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match="not empty") as error:
        pretrain.pretrain_command(Namespace(out=str(tmp_path), updates=1, seed=0, overwrite=False))
    assert error.value.exit_code == 2 and [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        pretrain.pretrain_command(Namespace(out=str(tmp_path / "file"), updates=1, seed=0, overwrite=False))
