"""How fast an update was: tokens a second, and the share of the devices' peak that went into the model.

Model FLOPs are 6 a token and weight of a matrix product (forward 2, backward 4; arXiv 2001.08361, section 2.1). What
is computed beyond that (attention scores, recomputation, padding) counts as time, not as work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from azr_jax.chips import chip_of
from azr_jax.learn.packing import PackedBatch
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Spec, param_specs


def flops_a_token(model: ModelConfig) -> float:
    """Of the forward and backward pass; the embedding counts if logits are made with it."""
    specs = param_specs(model)
    if not model.tie_word_embeddings:
        del specs["embed"]
    leaves: list[Any] = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, Spec))
    return 6.0 * sum(math.prod(spec.shape) for spec in leaves if spec.init == "normal")


def throughput(
    batch: PackedBatch, seconds: float, model: ModelConfig, devices: Sequence[jax.Device]
) -> dict[str, float]:
    """`perf/update_tokens_per_second` of prompts and responses and, where the peak is known, `perf/mfu`."""
    rate = float((batch.segments[: batch.n_micro] != 0).sum()) / seconds
    chip = chip_of(devices[0].device_kind)
    found = {"perf/update_tokens_per_second": rate}
    return found if chip is None else found | {"perf/mfu": rate * flops_a_token(model) / (chip.flops * len(devices))}
