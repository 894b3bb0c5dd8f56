"""Model configuration, read from a Hugging Face config.json.

One dataclass describes every supported decoder by its features, not by its name: `transformer.py` looks at features
only. What the dataclass does not describe is refused by name, so a checkpoint is never run with a feature silently
ignored. A new family is one function here and one table in families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from azr_jax.errors import UserError
from azr_jax.models.rope import Rope

Fields = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: GQA, RoPE, RMSNorm, gated feed-forward, and the features of its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = field(default_factory=lambda: Rope(1e6))
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    model_type: str = "qwen2"  #: family, which names weights in checkpoints
    max_positions: int = 32768  #: longest context the model was made for
    attention_bias: bool = True  #: on q, k and v (Qwen2)
    qk_norm: bool = False  #: RMSNorm on each query and key head (Qwen3, Gemma 3)
    post_norms: bool = False  #: norms after attention and feed-forward too (Gemma 3)
    norm_offset: float = 0.0  #: added to the gain of every norm; 1 in Gemma
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0  #: embeddings are multiplied by it; sqrt(hidden_size) in Gemma
    query_scale: float = 0.0  #: attention scores are multiplied by it; 0: head_dim ** -0.5
    sliding_window: int = 0  #: positions that a sliding layer sees, itself included
    sliding_layers: tuple[bool, ...] = ()  #: which layers slide; () for none
    local_rope: Rope | None = None  #: of sliding layers, where it differs (Gemma 3)

    @property
    def score_scale(self) -> float:
        """Factor of attention scores."""
        return self.query_scale or self.head_dim**-0.5

    @property
    def num_params(self) -> int:
        """Number of weights."""
        d, f, h, kv, hd = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads, self.head_dim
        attention = d * hd * (2 * h + 2 * kv) + (hd * (h + 2 * kv) if self.attention_bias else 0)
        norms = d * (4 if self.post_norms else 2) + (2 * hd if self.qk_norm else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + norms + 3 * d * f) + d

    def to_hf(self) -> Fields:
        """The config.json of this model, loadable by `transformers` (the keys that describe its shape)."""
        fields: Fields = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_positions,
            "attention_dropout": 0.0,
        }
        if self.model_type == "gemma3_text":
            assert self.local_rope is not None  # `_gemma3` sets it
            return fields | {
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": round(self.query_scale**-2),
                "rope_local_base_freq": self.local_rope.theta,
                "sliding_window": self.sliding_window,
                "layer_types": self._layer_types(),
            }
        fields["hidden_act"] = "silu"
        if self.model_type == "llama":
            return fields
        fields["use_sliding_window"] = bool(self.sliding_layers)
        if self.sliding_layers:
            fields |= {"sliding_window": self.sliding_window, "layer_types": self._layer_types()}
        return fields

    def _layer_types(self) -> list[str]:
        return ["sliding_attention" if slides else "full_attention" for slides in self.sliding_layers]

    @classmethod
    def from_hf(cls, fields: Any, where: str) -> ModelConfig:
        """From the contents of a config.json; `where` names it in errors.

        Raises UserError for an unsupported model type or feature, a missing key, a value of the wrong type, or sizes
        that do not fit together.
        """
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not a JSON object")
        model_type = fields.get("model_type")
        if fields.get("quantization_config"):
            raise UserError(f"{where}: quantized checkpoints are not supported; give one in bfloat16 or float32")
        if model_type == "gemma3" and isinstance(fields.get("text_config"), dict):  # with a vision part, left out
            model_type, fields = "gemma3_text", fields["text_config"]
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(f"{where}: model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})")
        for key in ("attention_bias", "mlp_bias"):
            if fields.get(key):
                raise UserError(f"{where}: {key} is not supported in {model_type}")
        defaults, features = FAMILIES[model_type]
        fields = defaults | {key: value for key, value in fields.items() if value is not None}
        try:
            heads = int(fields["num_attention_heads"])
            config = cls(
                vocab_size=int(fields["vocab_size"]),
                hidden_size=int(fields["hidden_size"]),
                intermediate_size=int(fields["intermediate_size"]),
                num_layers=int(fields["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(fields.get("num_key_value_heads", heads)),
                head_dim=int(fields.get("head_dim", int(fields["hidden_size"]) // heads)),
                rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
                model_type=model_type,
                max_positions=int(fields.get("max_position_embeddings", 32768)),
                **features(fields, where),
            )
        except KeyError as error:
            raise UserError(f"{where}: key {error} is missing") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise UserError(f"{where}: a size has a value that is no number, or an impossible one: {error}") from None
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        """UserError for sizes that are too small or do not fit together."""
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers, self.head_dim)
        if min(sizes) < 1 or min(self.num_heads, self.num_kv_heads, self.max_positions) < 1:
            raise UserError(f"{where}: every size must be at least 1: {self}")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads, head_dim even")
        for rope in (self.rope, self.local_rope or self.rope):
            if not rope.is_sound():
                raise UserError(f"{where}: a RoPE with impossible values: {rope}")
        if not self.rms_norm_eps >= 0 or isinstance(self.query_scale, complex):
            raise UserError(f"{where}: rms_norm_eps and query_pre_attn_scalar cannot be negative")
        if self.sliding_layers and (len(self.sliding_layers) != self.num_layers or self.sliding_window < 1):
            raise UserError(f"{where}: layer_types needs one entry a layer, and sliding_window at least 1")

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """From `folder`/config.json. Raises UserError if it is missing, not JSON or unsupported."""
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{path}: not found; a model is a Hugging Face folder with config.json", exit_code=2
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        return cls.from_hf(fields, str(path))


def _rope(fields: Fields, where: str) -> Rope:
    """The one RoPE of a model: `rope_theta` and `rope_scaling`, or (newer) both in `rope_parameters`."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling")
    theta, longest = float(fields.get("rope_theta", 10000.0)), int(fields["max_position_embeddings"])
    return Rope.from_hf(theta, scaling, longest, where)


def _silu(fields: Fields, where: str) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported (only silu)")


def _windows(fields: Fields, where: str) -> Fields:
    """Sliding layers of a Qwen model: off unless `use_sliding_window`, then from layer `max_window_layers` on."""
    if not fields.get("use_sliding_window"):
        return {}
    first = int(fields.get("max_window_layers", 28))
    slides = tuple(i >= first for i in range(int(fields["num_hidden_layers"])))
    return {"sliding_window": int(fields["sliding_window"]), "sliding_layers": _sliding(fields, slides, where)}


def _sliding(fields: Fields, default: tuple[bool, ...], where: str) -> tuple[bool, ...]:
    """Which layers slide by `layer_types`, else `default`; () if none does."""
    types = fields.get("layer_types")
    if types is not None and not set(types) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{where}: layer_types {sorted(set(types))} are not supported")
    slides = default if types is None else tuple(kind == "sliding_attention" for kind in types)
    return slides if any(slides) else ()


def _qwen2(fields: Fields, where: str) -> Fields:
    _silu(fields, where)
    return {"rope": _rope(fields, where), "attention_bias": True, **_windows(fields, where)}


def _qwen3(fields: Fields, where: str) -> Fields:
    _silu(fields, where)
    return {"rope": _rope(fields, where), "attention_bias": False, "qk_norm": True, **_windows(fields, where)}


def _llama(fields: Fields, where: str) -> Fields:
    _silu(fields, where)
    return {"rope": _rope(fields, where), "attention_bias": False}


def _gemma3(fields: Fields, where: str) -> Fields:
    """Gemma 3 text (transformers' configuration_gemma3.py, modeling_gemma3.py)."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.get(key):
            raise UserError(f"{where}: {key} is not supported")
    if fields.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_activation {fields['hidden_activation']!r} is not supported")
    nested = fields.get("rope_parameters") or {}
    if not nested.keys() <= {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: rope_parameters of {sorted(nested)}; Gemma 3 has full_attention, sliding_attention")
    longest = int(fields["max_position_embeddings"])
    whole = nested.get("full_attention") or fields.get("rope_scaling")
    local = Rope.from_hf(float(fields["rope_local_base_freq"]), nested.get("sliding_attention"), longest, where)
    every = int(fields["sliding_window_pattern"])
    slides = tuple(bool((i + 1) % every) for i in range(int(fields["num_hidden_layers"])))
    if local.scaling != "default":
        raise UserError(f"{where}: RoPE scaling of sliding layers is not supported")
    return {
        "rope": Rope.from_hf(float(fields["rope_theta"]), whole, longest, where),
        "local_rope": local,
        "attention_bias": False,
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embed_scale": float(fields["hidden_size"]) ** 0.5,
        "query_scale": float(fields["query_pre_attn_scalar"]) ** -0.5,
        "sliding_window": int(fields["sliding_window"]),
        "sliding_layers": _sliding(fields, slides, where),
    }


#: What a config.json may leave out (the defaults of transformers' configuration classes), and the family's features.
FAMILIES: dict[str, tuple[Fields, Callable[[Fields, str], Fields]]] = {
    "qwen2": ({"max_position_embeddings": 32768}, _qwen2),
    "qwen3": ({"max_position_embeddings": 32768, "head_dim": 128}, _qwen3),
    "llama": ({"max_position_embeddings": 2048}, _llama),
    "gemma3_text": (
        {
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
        },
        _gemma3,
    ),
}
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
