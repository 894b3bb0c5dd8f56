"""The policy: a decoder-only transformer as pure functions over a nested dict of weights.

Flax NNX declares the weights (`Transformer`), `weights_of` splits them off once, and every compiled step computes on
that dict: blocks are stacked on a leading layer axis and run with `lax.scan`, so compile time does not grow with
depth. The sampler (prefill, decode) and the learner (forward) run the same `block`, which is why their
log-probabilities agree. Norms, softmax and logits are computed in float32, the body in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from azr_jax.models.config import ModelConfig

Params = dict[str, Any]
Array = jax.Array

#: Up to this depth the layer scan is unrolled: tiny models run faster that way on CPU and still compile at once.
UNROLL_UP_TO = 8


class Spec(NamedTuple):
    """Everything about one weight: shape, logical axis names (see azr_jax.dist.mesh), initializer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # "normal" (std 0.02, as Qwen2), "ones" or "zeros"


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Nested dict of Spec, the one place where weights are declared. Blocks are stacked: [L, ...]."""
    n, d, f = config.num_layers, config.hidden_size, config.intermediate_size
    h, kv, hd = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = {
        "attn_norm": Spec((n, d), ("layers", None), "ones"),
        "q": Spec((n, d, h, hd), ("layers", "embed", "heads", None), "normal"),
        "k": Spec((n, d, kv, hd), ("layers", "embed", "kv_heads", None), "normal"),
        "v": Spec((n, d, kv, hd), ("layers", "embed", "kv_heads", None), "normal"),
        "o": Spec((n, h, hd, d), ("layers", "heads", None, "embed"), "normal"),
        "mlp_norm": Spec((n, d), ("layers", None), "ones"),
        "gate": Spec((n, d, f), ("layers", "embed", "mlp"), "normal"),
        "up": Spec((n, d, f), ("layers", "embed", "mlp"), "normal"),
        "down": Spec((n, f, d), ("layers", "mlp", "embed"), "normal"),
    }
    if config.attention_bias:
        blocks["q_bias"] = Spec((n, h, hd), ("layers", "heads", None), "zeros")
        blocks["k_bias"] = Spec((n, kv, hd), ("layers", "kv_heads", None), "zeros")
        blocks["v_bias"] = Spec((n, kv, hd), ("layers", "kv_heads", None), "zeros")
    specs: dict[str, Any] = {
        "embed": Spec((config.vocab_size, d), ("vocab", "embed"), "normal"),
        "blocks": blocks,
        "final_norm": Spec((d,), (None,), "ones"),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = Spec((d, config.vocab_size), ("embed", "vocab"), "normal")
    return specs


def initialize(spec: Spec, key: Array) -> Array:
    """One float32 weight."""
    if spec.init == "normal":
        return 0.02 * jax.random.normal(key, spec.shape, jnp.float32)
    return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, jnp.float32)


class Transformer(nnx.Module):
    """NNX declaration of the weights; calling it gives logits. Compiled steps use `weights_of(model)` instead."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        def declare(spec: Spec) -> nnx.Param:
            return nnx.Param(initialize(spec, rngs.params()))

        specs = param_specs(config)
        self.blocks = nnx.Dict({name: declare(spec) for name, spec in specs.pop("blocks").items()})
        for name, spec in specs.items():
            setattr(self, name, declare(spec))

    def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """float32 logits [B, T, V] of int32 tokens [B, T]; see `forward` for positions and segments."""
        params = weights_of(self)
        return unembed(params, self.config, forward(params, self.config, tokens, positions, segments))


def weights_of(model: Transformer) -> Params:
    """The model's weights as a nested dict of arrays (the state half of `nnx.split`)."""
    _, state = nnx.split(model)
    return nnx.to_pure_dict(state)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 weights."""
    return weights_of(Transformer(config, rngs=nnx.Rngs(params=seed)))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def rope_angles(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, hd / 2] of rotary position embedding at int positions [B, T]."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequency  # [B, T, hd / 2]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Apply rotary embedding to x [B, T, heads, hd] (half-split layout, as in `transformers`)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Grouped-query attention, softmax in float32.

    q [B, T, H, hd], k and v [B, S, KV, hd], mask bool [B, T, S] (True = may attend) -> [B, T, H, hd].
    Query head h reads key head h // (H / KV).
    """
    b, t, h, hd = q.shape
    kv = k.shape[2]
    q = q.reshape(b, t, kv, h // kv, hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * hd**-0.5
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, h, hd)


Attention = Callable[[Array, Array, Array], tuple[Array, Any]]
Constraint = Callable[[Array], Array]


def block(x: Array, w: Params, config: ModelConfig, angles: tuple[Array, Array], attention: Attention) -> tuple:
    """One decoder block: x [B, T, D], this layer's weights -> (x [B, T, D], whatever `attention` keeps).

    `attention(q, k, v)` gets rotated q [B, T, H, hd], k and v [B, T, KV, hd] and returns ([B, T, H, hd], kept).
    """
    y = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
    q, k, v = (jnp.einsum("btd,dnh->btnh", y, w[name]) for name in ("q", "k", "v"))
    if config.attention_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    out, kept = attention(rotate(q, angles), rotate(k, angles), v)
    x = x + jnp.einsum("btnh,nhd->btd", out, w["o"])
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    hidden = jax.nn.silu(y @ w["gate"]) * (y @ w["up"])
    return x + hidden @ w["down"], kept


def scan_blocks(step: Callable, x: Any, xs: Any, config: ModelConfig) -> tuple[Any, Any]:
    """lax.scan over stacked layers, unrolled for shallow models."""
    unroll = config.num_layers if config.num_layers <= UNROLL_UP_TO else 1
    return lax.scan(step, x, xs, unroll=unroll)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    segments: Array,
    remat: bool = False,
    constrain: Constraint | None = None,
) -> Array:
    """Final hidden states of packed rows, after the last norm.

    tokens, positions, segments: int32 [B, T]; segment 0 is padding, tokens attend causally within their own segment.
    remat: recompute each block in the backward pass instead of keeping its activations.
    constrain: lays out activations [B, T, D] on a mesh, after the embedding and after every block. Without it the
    compiler of a sharded program may gather activations where it should gather the weights of one layer.
    Returns [B, T, D] in the weights' dtype.
    """
    return prefill(params, config, tokens, positions, segments, keep_cache=False, remat=remat, constrain=constrain)[0]


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    segments: Array,
    keep_cache: bool = True,
    remat: bool = False,
    constrain: Constraint | None = None,
) -> tuple[Array, Any]:
    """As `forward`, also returning the keys and values of every layer: (k, v), each [L, B, T, KV, hd], or None."""
    t = tokens.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    mask = causal[None] & (segments[:, :, None] == segments[:, None, :])  # [B, T, T]
    angles = rope_angles(config, positions)

    def layer(x: Array, w: Params) -> tuple[Array, Any]:
        def attention(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            return attend(q, k, v, mask), ((k, v) if keep_cache else None)

        x, kept = block(x, w, config, angles, attention)
        return constrain(x) if constrain else x, kept

    x = params["embed"][tokens]  # [B, T, D]
    x = constrain(x) if constrain else x
    x, cache = scan_blocks(jax.checkpoint(layer) if remat else layer, x, params["blocks"], config)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache


def unembed(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """float32 logits [..., V] of hidden [..., D]."""
    if config.tie_word_embeddings:
        return jnp.einsum("...d,vd->...v", hidden, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("...d,dv->...v", hidden, params["lm_head"], preferred_element_type=jnp.float32)
