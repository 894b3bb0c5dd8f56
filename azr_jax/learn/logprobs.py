"""Log-probability and exact entropy of next tokens without ever holding [B, T, V] logits.

The vocabulary projection is computed for a chunk of tokens at a time and computed again in the backward pass, so no
array is larger than one chunk of logits, whatever the length of the rows. Tokens that nobody asks about (prompts,
padding) are skipped: each row's wanted tokens are moved to its front, and the loop ends with the longest row. This is
the only path: training, the check of sampler against learner and scoring all go through it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Array, Params, unembed
from azr_jax.models.vocabulary import ban

#: Tokens whose logits exist at once: 256, where the projection is just compute-bound on current accelerators, and more
#: of a small vocabulary, up to 2^22 logits (16 MiB of float32: what is larger falls out of a CPU's caches).
SMALLEST_CHUNK = 256
SMALL_LOGITS = 1 << 22


def chunk_tokens(config: ModelConfig) -> int:
    """Of how many tokens a device should hold the logits at once."""
    return max(SMALLEST_CHUNK, SMALL_LOGITS // config.vocab_size)


def next_token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    targets: Array,
    temperature: float,
    tokens: int | None = None,
    banned: Array | None = None,
    wanted: Array | None = None,
) -> tuple[Array, Array]:
    """log p(target) and entropy of the distribution it was sampled from, both float32 [B, T], in nats.

    hidden [B, T, D] are final hidden states, targets int32 [B, T] the token that follows each position. Logits are
    divided by the temperature in float32, and `banned` tokens (bool [V]) have probability 0, exactly as in the sampler.
    wanted: bool [B, T]; elsewhere both results are 0 (None: all are wanted).
    tokens: how many tokens' logits exist at once, at least one column of B (None: `chunk_tokens`). Chunks run along T,
    so rows stay on the devices that hold them.
    """
    b, t, _ = hidden.shape
    chunk = min(t, max(1, (tokens or chunk_tokens(config)) // b))
    head = "embed" if config.tie_word_embeddings else "lm_head"
    found = _scored(params[head], hidden, targets, banned, wanted, _How(head, config, temperature, chunk))
    return found if wanted is None else tuple(jnp.where(wanted, x, 0.0) for x in found)  # type: ignore[return-value]


class _How(NamedTuple):
    """What is known when compiling: the head's name, how logits come from it, and columns of a chunk."""

    head: str
    config: ModelConfig
    temperature: float
    chunk: int

    def logits(self, head: Array, hidden: Array, banned: Array | None) -> Array:
        """float32 [B * C, V], as the sampler has them."""
        return ban(unembed({self.head: head}, self.config, hidden), banned) / self.temperature


class _Terms(NamedTuple):
    """Results chunk by chunk, float32 [N, B * C]; log_norm is the logsumexp of the logits."""

    logprob: Array
    entropy: Array
    log_norm: Array


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scored(
    head: Array, hidden: Array, targets: Array, banned: Array | None, wanted: Array | None, how: _How
) -> tuple[Array, Array]:
    return _forward(head, hidden, targets, banned, wanted, how)[0]


def _forward(
    head: Array, hidden: Array, targets: Array, banned: Array | None, wanted: Array | None, how: _How
) -> tuple[tuple[Array, Array], tuple]:
    order = _Order.of(wanted, how.chunk, hidden.shape[1])
    states, wants = order.chunks(hidden), order.chunks(targets)  # [N, B * C, D], [N, B * C]

    def score(index: Array, done: _Terms) -> _Terms:
        logits = how.logits(head, states[index], banned)  # [B * C, V]
        top = jnp.max(logits, axis=-1, keepdims=True)
        below = logits - top
        odds = jnp.exp(below)
        norm = jnp.sum(odds, axis=-1)
        log_norm = jnp.log(norm)
        # A masked sum instead of a gather: it splits over a vocabulary that is sharded.
        logprob = jnp.sum(jnp.where(_chosen(logits, wants[index]), below, 0.0), axis=-1) - log_norm
        entropy = log_norm - jnp.sum(odds * below, axis=-1) / norm  # both terms are at least 0
        new = _Terms(logprob, entropy, log_norm + top[..., 0])
        return _Terms(*(_put(x, value, index) for x, value in zip(done, new, strict=True)))

    zero = jnp.zeros(wants.shape, jnp.float32)
    terms = lax.fori_loop(0, order.used, score, _Terms(zero, zero, zero))
    return (order.rows(terms.logprob), order.rows(terms.entropy)), (head, hidden, targets, banned, wanted, terms)


def _backward(how: _How, kept: tuple, gradients: tuple[Array, Array]) -> tuple:
    head, hidden, targets, banned, wanted, terms = kept
    tied = how.config.tie_word_embeddings
    order = _Order.of(wanted, how.chunk, hidden.shape[1])
    states, wants = order.chunks(hidden), order.chunks(targets)
    d_logprob, d_entropy = (order.chunks(x)[..., None] for x in gradients)  # [N, B * C, 1]
    entropy, log_norm = terms.entropy[..., None], terms.log_norm[..., None]

    def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_states, d_head = carry
        x = states[index]
        logp = how.logits(head, x, banned) - log_norm[index]  # [B * C, V]
        # d logprob / d logit = [chosen] - p; d entropy / d logit = -p (log p + entropy)
        d_logits = jnp.where(_chosen(logp, wants[index]), d_logprob[index], 0.0)
        d_logits -= jnp.exp(logp) * (d_logprob[index] + d_entropy[index] * (logp + entropy[index]))
        d_logits = (d_logits / how.temperature).astype(head.dtype)
        d_x = jnp.einsum("cv,vd->cd" if tied else "cv,dv->cd", d_logits, head)
        # [D, V] also where the head is [V, D]: the other way round, XLA on CPU transposes the logits' gradient.
        new = jnp.einsum("cd,cv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return _put(d_states, d_x, index), d_head + new

    zero = jnp.zeros_like(states), jnp.zeros(head.shape[::-1] if tied else head.shape, jnp.float32)
    d_states, d_head = lax.fori_loop(0, order.used, add, zero)
    return (d_head.T if tied else d_head).astype(head.dtype), order.rows(d_states), None, None, None


_scored.defvjp(_forward, _backward)


class _Order(NamedTuple):
    """Columns of every row, wanted ones first, in chunks of which the first `used` hold all that are wanted."""

    front: Array | None  # int32 [B, T], which column comes where; None: they stay
    back: Array | None  # its inverse
    used: Array
    chunk: int
    length: int  # T

    @classmethod
    def of(cls, wanted: Array | None, chunk: int, length: int) -> _Order:
        if wanted is None:
            return cls(None, None, jnp.int32(-(-length // chunk)), chunk, length)
        front = jnp.argsort(~wanted, axis=1, stable=True)
        most = jnp.max(jnp.sum(wanted, axis=1))
        return cls(front, jnp.argsort(front, axis=1), (most + chunk - 1) // chunk, chunk, length)

    def chunks(self, x: Array) -> Array:
        """[B, T, ...] -> [N, B * C, ...], padded with zeros. One axis: see `rms_norm`."""
        x = x if self.front is None else _columns(x, self.front)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.chunk), *[(0, 0)] * (x.ndim - 2)))
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, self.chunk, *x.shape[2:]), 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def rows(self, x: Array) -> Array:
        """The inverse of `chunks`."""
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, self.chunk, *x.shape[2:]), 0, 1)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]
        return x if self.back is None else _columns(x, self.back)


def _columns(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _chosen(logits: Array, targets: Array) -> Array:
    """bool [B * C, V]: where the target is."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _put(x: Array, value: Array, index: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, value, index, axis=0)
