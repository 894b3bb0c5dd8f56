"""Names and layouts of weights in Hugging Face checkpoints, one two-way table per family.

A row says where one of our weights lives: the Hugging Face key (with `{layer}` for stacked blocks), and how to get
from their layout to ours and back. Loading and export read the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from azr_jax.models.config import ModelConfig


class Row(NamedTuple):
    """One weight: Hugging Face key, their array -> ours, our array -> theirs (per layer for stacked blocks)."""

    key: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(key: str) -> Row:
    return Row(key, lambda w: w, lambda w: w)


def _transposed(key: str) -> Row:
    return Row(key, lambda w: w.T, lambda w: w.T)


def _into_heads(key: str, heads: int, dim: int) -> Row:
    """[heads * dim, D] <-> [D, heads, dim]."""
    return Row(
        key,
        lambda w: w.T.reshape(-1, heads, dim),
        lambda w: w.reshape(w.shape[0], heads * dim).T,
    )


def _from_heads(key: str, heads: int, dim: int) -> Row:
    """[D, heads * dim] <-> [heads, dim, D]."""
    return Row(
        key,
        lambda w: w.T.reshape(heads, dim, -1),
        lambda w: w.reshape(heads * dim, w.shape[2]).T,
    )


def _bias(key: str, heads: int, dim: int) -> Row:
    """[heads * dim] <-> [heads, dim]."""
    return Row(key, lambda w: w.reshape(heads, dim), lambda w: w.reshape(-1))


def weight_table(config: ModelConfig) -> dict[str, Row]:
    """Our path ("embed", "blocks/q", ...) -> its Row, for Qwen2 and Qwen2.5 (transformers' modeling_qwen2.py)."""
    h, kv, hd = config.num_heads, config.num_kv_heads, config.head_dim
    layer = "model.layers.{layer}."
    table = {
        "embed": _same("model.embed_tokens.weight"),
        "blocks/attn_norm": _same(layer + "input_layernorm.weight"),
        "blocks/q": _into_heads(layer + "self_attn.q_proj.weight", h, hd),
        "blocks/k": _into_heads(layer + "self_attn.k_proj.weight", kv, hd),
        "blocks/v": _into_heads(layer + "self_attn.v_proj.weight", kv, hd),
        "blocks/q_bias": _bias(layer + "self_attn.q_proj.bias", h, hd),
        "blocks/k_bias": _bias(layer + "self_attn.k_proj.bias", kv, hd),
        "blocks/v_bias": _bias(layer + "self_attn.v_proj.bias", kv, hd),
        "blocks/o": _from_heads(layer + "self_attn.o_proj.weight", h, hd),
        "blocks/mlp_norm": _same(layer + "post_attention_layernorm.weight"),
        "blocks/gate": _transposed(layer + "mlp.gate_proj.weight"),
        "blocks/up": _transposed(layer + "mlp.up_proj.weight"),
        "blocks/down": _transposed(layer + "mlp.down_proj.weight"),
        "final_norm": _same("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        table["lm_head"] = _transposed("lm_head.weight")
    return table
