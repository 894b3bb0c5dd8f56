"""Rotary position embedding: its base, its scaling for longer contexts, and the angles they give.

Frequencies follow `transformers`' modeling_rope_utils.py to the last bit of float32 (same operations in the same
order), because an error in a frequency grows with the position. Scalings that are not listed here are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax.errors import UserError

Array = jax.Array
SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Base `theta` and scaling. Which fields matter depends on `scaling`; names are those of Hugging Face."""

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn

    @classmethod
    def from_hf(cls, theta: float, fields: Any, max_positions: int, where: str) -> Rope:
        """From a `rope_scaling` or `rope_parameters` object of a config.json (None: no scaling).

        UserError: an unknown scaling, or a value of it that is missing or no number.
        """
        fields = {} if fields is None else fields
        scaling = fields.get("rope_type", fields.get("type", "default")) if isinstance(fields, dict) else fields
        if scaling not in SCALINGS or not isinstance(fields, dict):
            raise UserError(f"{where}: RoPE scaling {scaling!r} is not supported (supported: {', '.join(SCALINGS)})")
        if float(fields.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(f"{where}: RoPE on a part of each head (partial_rotary_factor) is not supported")
        theta = float(fields.get("rope_theta") or theta)
        if scaling == "default":
            return cls(theta)
        try:
            original = int(fields.get("original_max_position_embeddings") or max_positions)
            rope = cls(theta, scaling, float(fields["factor"]), original)
            if scaling == "linear":
                return cls(theta, scaling, rope.factor)
            if scaling == "llama3":
                low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
                return cls(theta, scaling, rope.factor, original, low, high)
            return cls(
                theta,
                scaling,
                rope.factor,
                original,
                beta_fast=float(fields.get("beta_fast") or 32),
                beta_slow=float(fields.get("beta_slow") or 1),
                attention_factor=_yarn_attention_factor(rope.factor, fields),
                truncate=bool(fields.get("truncate", True)),
            )
        except KeyError as error:
            raise UserError(f"{where}: RoPE scaling {scaling!r} lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: RoPE scaling {scaling!r} has a value that is no number: {error}") from None

    def is_sound(self) -> bool:
        """Whether the frequencies are finite and positive."""
        known = self.scaling in ("default", "linear") or self.original_max_position_embeddings > 0
        spread = self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor > 0
        return 1 < self.theta < math.inf and 0 < self.factor < math.inf and known and spread

    def to_hf(self) -> dict[str, Any] | None:
        """The `rope_scaling` object of a config.json; None without scaling."""
        if self.scaling == "default":
            return None
        names = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate", "original_max_position_embeddings"),
        }[self.scaling]
        return {"rope_type": self.scaling, "factor": self.factor} | {name: getattr(self, name) for name in names}

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 [head_dim / 2], radians a position."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.scaling == "linear":
            return plain / np.float32(self.factor)
        if self.scaling == "llama3":
            return self._llama3(plain)
        return self._yarn(plain, head_dim) if self.scaling == "yarn" else plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Llama 3.1: long waves are slowed down by `factor`, short ones kept, those between blended."""
        length = np.float32(self.original_max_position_embeddings)
        low, high, factor = (np.float32(x) for x in (self.low_freq_factor, self.high_freq_factor, self.factor))
        waves = np.float32(2 * math.pi) / plain  # positions a turn
        share = (length / waves - low) / (high - low)
        blended = (1 - share) * plain / factor + share * plain
        return np.where(waves > length / low, plain / factor, np.where(waves < length / high, plain, blended))

    def _yarn(self, plain: np.ndarray, head_dim: int) -> np.ndarray:
        """YaRN (arXiv 2309.00071, section 3.2): a ramp over the dimensions, from kept to slowed down by `factor`."""

        def dimension(turns: float) -> float:  # that turns so often over the original context
            waves = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(waves) / (2 * math.log(self.theta))

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0, 1).astype(np.float32)
        return plain / np.float32(self.factor) * ramp + plain * (1 - ramp)

    def angles(self, head_dim: int, positions: Array) -> tuple[Array, Array]:
        """cos and sin, float32 [B, T, 1, head_dim / 2], at int positions [B, T]."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(head_dim)  # [B, T, head_dim / 2]
        cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
        if self.attention_factor == 1.0:
            return cos, sin
        return cos * self.attention_factor, sin * self.attention_factor


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Apply rotary embedding to x [B, T, heads, hd] (half-split layout, as in `transformers`)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _yarn_attention_factor(factor: float, fields: dict[str, Any]) -> float:
    """As given, or the paper's 0.1 ln(factor) + 1 (with DeepSeek's two multipliers where they are set)."""
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    up, down = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(float(up)) / scale(float(down)) if up and down else scale(1.0)
