"""Tokens a second and MFU of an update."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from azr_jax.chips import chip_of
from azr_jax.learn.packing import Trajectory, pack
from azr_jax.learn.throughput import flops_a_token, throughput
from azr_jax.models.config import ModelConfig
from azr_jax.models.sizes import published_size
from azr_jax.telemetry.metrics import unknown_names

TINY = ModelConfig(100, 32, 64, 2, 4, 2, 8)


def test_flops_of_a_tiny_model_by_hand() -> None:
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert flops_a_token(TINY) == 6 * (2 * layer + 100 * 32)
    assert flops_a_token(replace(TINY, tie_word_embeddings=False)) == flops_a_token(TINY)  # one lookup, one product
    assert flops_a_token(published_size("qwen2.5-7b")) == pytest.approx(6 * 7.07e9, rel=0.01)


def test_throughput_counts_tokens_and_not_padding() -> None:
    made = [Trajectory(np.ones(5, np.int32), np.ones(7, np.int32), np.zeros(7, np.float32), 0.0, 0)] * 3
    batch = pack(made, [0.0] * 3, 32, 2, 4)
    devices: list[Any] = [SimpleNamespace(device_kind="TPU v5 lite")] * 4
    found = throughput(batch, 0.5, TINY, devices)
    assert found["perf/update_tokens_per_second"] == 72
    assert found["perf/mfu"] == pytest.approx(72 * flops_a_token(TINY) / (4 * 197e12))
    assert unknown_names(found) == []
    devices = [SimpleNamespace(device_kind="cpu")]
    assert throughput(batch, 0.5, TINY, devices).keys() == {"perf/update_tokens_per_second"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("TPU v6 lite", "v6e"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_a_chip_by_jaxs_name_for_it(kind: str, name: str) -> None:
    chip = chip_of(kind)
    assert chip is not None and chip.name == name and chip.usable < chip.hbm * 1.001
