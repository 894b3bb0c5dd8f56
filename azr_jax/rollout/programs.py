"""The compiled programs of the sampler: prefill prompts into pages, decode a block of tokens for every slot.

A prefill computes keys and values of a prompt but for its last token; the decoder starts with that one, so every token
there is comes out of one program, whatever was shared or copied before. Rows have fixed places and shapes: what a row
computes does not depend on the others, on its slot, or on when it came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from azr_jax.models.attention import Visibility
from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Attend, Params, block, embed, rms_norm, rope_angles, unembed
from azr_jax.models.vocabulary import ban
from azr_jax.rollout.cache import Layer, Layout, Working, decode_attention, gather, write_pages
from azr_jax.rollout.sampling import Filtering, filter_logits, sample

Array = jax.Array
Cache = tuple[Layer, ...]


class Slots(NamedTuple):
    """A batch in flight as the host knows it between two blocks. B slots, W pages a row."""

    token: Array  # int32 [B], fed next
    position: Array  # int32 [B], its position; -1: the slot is empty
    generated: Array  # int32 [B], response tokens so far
    limit: Array  # int32 [B], most response tokens
    key: Array  # uint32 [B, 2]
    temperature: Array  # float32 [B], 0: greedy
    table: Array  # int32 [B, W], the pages of the row


class Block(NamedTuple):
    """What a block of up to K tokens a row produced."""

    tokens: Array  # int32 [B, K]
    logprobs: Array  # float32 [B, K]
    counts: Array  # int32 [B], how many of them are real
    eos: Array  # bool [B], the last one ends the sequence
    steps: Array  # int32 [], tokens any row got


class _State(NamedTuple):
    """Between two tokens of a block."""

    cache: Cache
    working: tuple[Working, ...] | None
    token: Array  # int32 [B], fed next
    gained: Array  # int32 [B], tokens of this block
    done: Array  # bool [B]
    eos: Array  # bool [B]
    seen: Array | None  # int32 [B, V], what the penalties count
    tokens: Array  # int32 [B, K]
    logprobs: Array  # float32 [B, K]
    step: Array  # int32 []


def through_layers(
    weights: Params,
    config: ModelConfig,
    x: Array,
    positions: Array,
    attention: Callable[[int, int | None, Array, Array, Array], Array],
) -> Array:
    """All blocks of the transformer, `weights["blocks"]` being a sequence of layers; x [B, T, D].

    attention(layer, window, q, k, v) -> [B, T, H, hd]. Layers stand one after the other in the program: a loop over
    stacked weights would copy each layer's before using it.
    """
    angles = rope_angles(config, positions)
    sliding = config.sliding_layers or (False,) * config.num_layers
    for i, (layer, slides) in enumerate(zip(weights["blocks"], sliding, strict=True)):
        window = config.sliding_window if slides else None

        def attend_here(q: Array, k: Array, v: Array, i: int = i, window: int | None = window) -> tuple[Array, None]:
            return attention(i, window, q, k, v), None

        x, _ = block(x, layer, config, angles[slides], attend_here)
    return x


def prefill(
    weights: Params, cache: Cache, tokens: Array, lengths: Array, pages: Array, config: ModelConfig, attend: Attend
) -> Cache:
    """Keys and values of prompts into their pages.

    tokens int32 [R, T], padded on the right to a multiple of the page; lengths int32 [R], 0 for an unused row;
    pages int32 [R, T / page], 0 where there is nothing to keep.
    """
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    visibility = Visibility.within((columns < lengths[:, None]).astype(jnp.int32), columns)
    written = list(cache)

    def attention(i: int, window: int | None, q: Array, k: Array, v: Array) -> Array:
        written[i] = write_pages(written[i], k, v, pages)
        return attend(q, k, v, visibility, scale=config.score_scale, window=window)

    through_layers(weights, config, embed(weights, config, tokens), columns, attention)
    return tuple(written)


def decode(
    weights: Params,
    cache: Cache,
    slots: Slots,
    enough: Array,
    banned: Array | None,
    filtering: Filtering | None,
    eos: Array,
    config: ModelConfig,
    layout: Layout,
    steps: int,
    mesh: Mesh,
) -> tuple[Block, Cache]:
    """Up to `steps` tokens for every slot in use; stops when `enough` (int32 []) of them are done.

    eos int32 [E]; banned bool [V], tokens never sampled; filtering: for inference only.
    """
    b = slots.token.shape[0]
    used = slots.position >= 0
    rows = jnp.arange(b)
    working: tuple[Working, ...] | None = None
    if layout.kind == "working":
        working = tuple(gather(layer, slots.table, config.head_dim, layout.compute_dtype) for layer in cache)

    def one_token(state: _State) -> _State:
        live = used & ~state.done
        position = jnp.maximum(slots.position, 0) + state.gained
        layers: list[Layer] = list(state.cache)
        copies: list[Working | None] = list(state.working or (None,) * len(cache))

        def attention(i: int, window: int | None, q: Array, k: Array, v: Array) -> Array:
            out, layers[i], copies[i] = decode_attention(
                layers[i], copies[i], q, k, v, slots.table, position, live, layout, config.score_scale, window, mesh
            )
            return out

        x = embed(weights, config, state.token[:, None])
        hidden = rms_norm(
            through_layers(weights, config, x, position[:, None], attention), weights["final_norm"], config
        )
        logits = ban(unembed(weights, config, hidden)[:, 0], banned)
        seen = state.seen
        if filtering is not None and seen is not None:
            logits = filter_logits(logits, filtering._replace(response=seen), slots.temperature)
        token, logprob = sample(logits, slots.key, slots.generated + state.gained, slots.temperature)
        if seen is not None:
            seen = seen.at[rows, token].add(live)
        ends = live & jnp.any(token[:, None] == eos, axis=-1)
        gained = state.gained + live
        at = (0, state.step)
        return _State(
            cache=tuple(layers),
            working=tuple(copy for copy in copies if copy is not None) or None,
            token=jnp.where(live, token, state.token),
            gained=gained,
            done=state.done | ends | (slots.generated + gained >= slots.limit),
            eos=state.eos | ends,
            seen=seen,
            tokens=lax.dynamic_update_slice(state.tokens, token[:, None], at),
            logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], at),
            step=state.step + 1,
        )

    def more(state: _State) -> Array:
        return (state.step < steps) & (jnp.sum(used & state.done) < enough)

    state = lax.while_loop(
        more,
        one_token,
        _State(
            cache=cache,
            working=working,
            token=slots.token,
            gained=jnp.zeros(b, jnp.int32),
            done=~used,
            eos=jnp.zeros(b, bool),
            seen=None if filtering is None else filtering.response,
            tokens=jnp.zeros((b, steps), jnp.int32),
            logprobs=jnp.zeros((b, steps), jnp.float32),
            step=jnp.int32(0),
        ),
    )
    return Block(state.tokens, state.logprobs, state.gained, state.eos, state.step), state.cache
