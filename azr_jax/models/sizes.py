"""Shapes of published models, for planning and measuring without their weights.

A real checkpoint is always read by its own config.json; these are the same keys, so both go through one parser.
"""

from __future__ import annotations

from typing import Any

from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig


def _qwen2(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": 151936 if tied else 152064,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }


def _qwen3(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    shape = _qwen2(hidden, feed_forward, layers, heads, 8, tied)
    return shape | {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}


def _llama3(
    hidden: int, feed_forward: int, layers: int, heads: int, head_dim: int, tied: bool, factor: float
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _gemma3(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, window: int) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": window,
    }


SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, tied=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, tied=True, factor=32.0),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, tied=True, factor=32.0),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, tied=False, factor=8.0),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 512) | {"vocab_size": 262144, "max_position_embeddings": 32768},
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 1024) | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
SIZES |= {name.replace("2.5", "2.5-coder"): shape for name, shape in SIZES.items() if name.startswith("qwen2.5")}


def published_size(name: str) -> ModelConfig:
    """The shape of a published model. UserError for a name that SIZES does not have."""
    if name not in SIZES:
        raise UserError(f"no published size is called {name!r}; there are {', '.join(sorted(SIZES))}")
    return ModelConfig.from_hf(SIZES[name], name)


def hub_name(name: str) -> str:
    """The Hugging Face repository with the weights of a published size."""
    if name.startswith("gemma"):
        return f"google/{name}-pt"
    return f"{'Qwen' if name.startswith('qwen') else 'meta-llama'}/{name.title()}"
