"""Model configuration, read from a Hugging Face config.json.

One dataclass describes every supported decoder. What it does not describe is refused by name, so a checkpoint is
never run with a feature silently ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azr_jax.errors import UserError

SUPPORTED = ("qwen2",)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer: GQA, RoPE, RMSNorm, SwiGLU, optional bias on q, k and v (Qwen2.5)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    model_type: str = "qwen2"

    @property
    def num_params(self) -> int:
        """Number of weights."""
        d, f, h, kv, hd = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads, self.head_dim
        attention = d * hd * (2 * h + 2 * kv) + (hd * (h + 2 * kv) if self.attention_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + 3 * d * f + 2 * d) + d

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, loadable by `transformers`."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hf(cls, fields: dict[str, Any], where: str) -> ModelConfig:
        """From the contents of a config.json; `where` names it in errors.

        Raises UserError for an unsupported model type, activation, sliding window or RoPE scaling, a missing key, a
        value of the wrong type, or sizes that do not fit together.
        """
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not a JSON object")
        model_type = fields.get("model_type")
        if model_type not in SUPPORTED:
            raise UserError(f"{where}: model_type {model_type!r} is not supported (supported: {', '.join(SUPPORTED)})")
        if fields.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported (only silu)")
        if fields.get("use_sliding_window"):
            raise UserError(f"{where}: use_sliding_window is not supported")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{where}: RoPE scaling {rope} is not supported")
        try:
            heads = int(fields["num_attention_heads"])
            config = cls(
                vocab_size=int(fields["vocab_size"]),
                hidden_size=int(fields["hidden_size"]),
                intermediate_size=int(fields["intermediate_size"]),
                num_layers=int(fields["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(fields.get("num_key_value_heads", heads)),
                head_dim=int(fields.get("head_dim") or fields["hidden_size"] // heads),
                rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
                model_type=model_type,
            )
        except KeyError as error:
            raise UserError(f"{where}: key {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{where}: a size has a value that is no number: {error}") from None
        sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim)
        if min(sizes) < 1 or min(config.num_heads, config.num_kv_heads) < 1:
            raise UserError(f"{where}: every size must be at least 1: {config}")
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads, head_dim even")
        return config

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """From `folder`/config.json. Raises UserError if it is missing, not JSON or unsupported."""
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; a model is a Hugging Face folder with config.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        return cls.from_hf(fields, str(path))
