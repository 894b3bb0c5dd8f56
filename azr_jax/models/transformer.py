"""The policy: a decoder-only transformer as pure functions over a nested dict of weights.

Flax NNX declares the weights (`Transformer`), `weights_of` splits them off once, and every compiled step computes on
that dict: blocks are stacked on a leading layer axis and run with `lax.scan`, so compile time does not grow with
depth. The sampler (prefill, decode) and the learner (forward) run the same `block`, which is why their
log-probabilities agree. Norms, softmax and logits are computed in float32, the body in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.projection import project
from azr_jax.models.rope import rotate
from azr_jax.models.visibility import Visibility

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
    gain = "zeros" if config.norm_offset else "ones"
    blocks = {
        "attn_norm": Spec((n, d), ("layers", None), gain),
        "q": Spec((n, d, h, hd), ("layers", "embed", "heads", None), "normal"),
        "k": Spec((n, d, kv, hd), ("layers", "embed", "kv_heads", None), "normal"),
        "v": Spec((n, d, kv, hd), ("layers", "embed", "kv_heads", None), "normal"),
        "o": Spec((n, h, hd, d), ("layers", "heads", None, "embed"), "normal"),
        "mlp_norm": Spec((n, d), ("layers", None), gain),
        "gate": Spec((n, d, f), ("layers", "embed", "mlp"), "normal"),
        "up": Spec((n, d, f), ("layers", "embed", "mlp"), "normal"),
        "down": Spec((n, f, d), ("layers", "mlp", "embed"), "normal"),
    }
    if config.attention_bias:
        blocks["q_bias"] = Spec((n, h, hd), ("layers", "heads", None), "zeros")
        blocks["k_bias"] = Spec((n, kv, hd), ("layers", "kv_heads", None), "zeros")
        blocks["v_bias"] = Spec((n, kv, hd), ("layers", "kv_heads", None), "zeros")
    if config.qk_norm:
        blocks["q_norm"] = Spec((n, hd), ("layers", None), gain)
        blocks["k_norm"] = Spec((n, hd), ("layers", None), gain)
    if config.post_norms:
        blocks["attn_post_norm"] = Spec((n, d), ("layers", None), gain)
        blocks["mlp_post_norm"] = Spec((n, d), ("layers", None), gain)
    specs: dict[str, Any] = {
        "embed": Spec((config.vocab_size, d), ("vocab", "embed"), "normal"),
        "blocks": blocks,
        "final_norm": Spec((d,), (None,), gain),
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


def rms_norm(x: Array, weight: Array, config: ModelConfig, apart: bool = False) -> Array:
    """RMSNorm of x [B, T, ..., D] over the last axis, in float32, returned in x's dtype.

    The gain is weight [D] + config.norm_offset. apart: B and T lie on different axes of a mesh and stay two axes.
    """
    # Rows and tokens as one axis: with a leading axis of 1, XLA on CPU is ten times slower at the gradient's sums.
    x32 = (x if apart else x.reshape(-1, *x.shape[2:])).astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.rms_norm_eps)
    gain = weight.astype(jnp.float32)
    y = x32 * scale * (gain + config.norm_offset if config.norm_offset else gain)
    return y.reshape(x.shape).astype(x.dtype)


Angles = tuple[Array, Array]
Attention = Callable[[Array, Array, Array], tuple[Array, Any]]
#: (q [B, T, H, hd], k and v [B, S, KV, hd], visibility, scale=, window=) -> [B, T, H, hd]; see attention.py.
Attend = Callable[..., Array]
#: What a block keeps for the backward pass: everything; results of matrix products; only its input.
Remat = Literal["none", "dots", "block"]


def _as_it_lies(x: Array) -> Array:
    return x


class TokenLayout(NamedTuple):
    """Where the tokens of activations [B, T, D] lie: functions that return their argument, laid out on a mesh.

    Products read whole rows: `gather` comes before them and `scatter` after; see azr_jax.dist.sequence. Without a
    layout, the compiler of a sharded program may gather activations where it should gather the weights of one layer.
    """

    whole: Callable[[Array], Array] = _as_it_lies
    gather: Callable[[Array], Array] = _as_it_lies
    scatter: Callable[[Array], Array] = _as_it_lies
    shared: bool = False  #: whether what is scattered has only a share of each row's tokens on a device


ONE_PLACE = TokenLayout()


def rope_angles(config: ModelConfig, positions: Array) -> tuple[Angles, Angles]:
    """Angles of full and of sliding layers at int positions [B, T]: cos and sin float32 [B, T, 1, hd / 2] each."""
    angles = config.rope.angles(config.head_dim, positions)
    return angles, config.local_rope.angles(config.head_dim, positions) if config.local_rope else angles


def block(
    x: Array, w: Params, config: ModelConfig, angles: Angles, attention: Attention, layout: TokenLayout = ONE_PLACE
) -> tuple:
    """One decoder block: x [B, T, D], this layer's weights -> (x [B, T, D], whatever `attention` keeps).

    `attention(q, k, v)` gets rotated q [B, T, H, hd], k and v [B, T, KV, hd] and returns ([B, T, H, hd], kept).
    x comes and goes as `layout.scatter` lays it out.
    """
    norm = partial(rms_norm, config=config, apart=layout.shared)
    y = layout.gather(norm(x, w["attn_norm"]))
    q, k, v = (project(y, w[name]) for name in ("q", "k", "v"))
    if config.attention_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config), rms_norm(k, w["k_norm"], config)
    out, kept = attention(rotate(q, angles), rotate(k, angles), v)
    y = layout.scatter(project(out, w["o"]))
    x = x + (norm(y, w["attn_post_norm"]) if config.post_norms else y)
    y = layout.gather(norm(x, w["mlp_norm"]))
    y = layout.scatter(project(_activate(project(y, w["gate"]), config) * project(y, w["up"]), w["down"]))
    return x + (norm(y, w["mlp_post_norm"]) if config.post_norms else y), kept


def _activate(x: Array, config: ModelConfig) -> Array:
    return jax.nn.silu(x) if config.activation == "silu" else jax.nn.gelu(x, approximate=True)


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
    remat: Remat = "none",
    layout: TokenLayout = ONE_PLACE,
    attend: Attend = attend,
) -> Array:
    """Final hidden states of packed rows, after the last norm.

    tokens, positions, segments: int32 [B, T]; segment 0 is padding; positions restart at 0 in each segment; a token
    sees its own segment up to its own position (in sliding layers, the last `sliding_window` of them).
    layout: where tokens lie on a mesh. Returns [B, T, D] in the weights' dtype.
    """
    return _run(params, config, tokens, positions, segments, False, remat, layout, attend)[0]


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    segments: Array,
    attend: Attend = attend,
) -> tuple[Array, tuple[Array, Array]]:
    """As `forward`, also returning the keys and values of every layer: (k, v), each [L, B, T, KV, hd]."""
    return _run(params, config, tokens, positions, segments, True, "none", ONE_PLACE, attend)


def _run(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    segments: Array,
    keep_cache: bool,
    remat: Remat,
    layout: TokenLayout,
    attend: Attend,
) -> tuple[Array, Any]:
    visibility = Visibility.within(segments, positions)
    full, local = rope_angles(config, positions)
    mixed = len(set(config.sliding_layers)) > 1

    def layer(x: Array, scanned: tuple[Params, Array]) -> tuple[Array, Any]:
        w, slides = scanned

        def attention(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            def within(window: int | None) -> Callable[[], Array]:
                return lambda: attend(q, k, v, visibility, scale=config.score_scale, window=window)

            if mixed:
                out = lax.cond(slides, within(config.sliding_window), within(None))
            else:
                out = within(config.sliding_window if config.sliding_layers else None)()
            return out, ((k, v) if keep_cache else None)

        angles = local if config.sliding_layers else full
        if mixed and config.local_rope:
            angles = jnp.where(slides, local[0], full[0]), jnp.where(slides, local[1], full[1])
        return block(x, w, config, angles, attention, layout)

    x = layout.scatter(layout.whole(embed(params, config, tokens)))  # [B, T, D]
    slides = np.asarray(config.sliding_layers or (False,) * config.num_layers)
    x, cache = scan_blocks(_checkpointed(layer, remat), x, (params["blocks"], slides), config)
    return layout.gather(rms_norm(x, params["final_norm"], config, layout.shared)), cache


def _checkpointed(layer: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(layer, policy=policy)


def embed(params: Params, config: ModelConfig, tokens: Array) -> Array:
    """Embeddings [..., D] of int tokens [...], in the weights' dtype."""
    x = params["embed"][tokens]
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, x.dtype)


def unembed(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """float32 logits [..., V] of hidden [..., D]."""
    if config.tie_word_embeddings:
        return jnp.einsum("...d,vd->...v", hidden, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("...d,dv->...v", hidden, params["lm_head"], preferred_element_type=jnp.float32)
