"""Log-probability and exact entropy of next tokens without ever holding [B, T, V] logits.

The vocabulary projection is computed for a chunk of tokens at a time and computed again in the backward pass, so no
array is larger than one chunk of logits, whatever the length of the rows. This is the only path: training, the check of
sampler against learner and scoring all go through it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from azr_jax.models.config import ModelConfig
from azr_jax.models.transformer import Array, Params, unembed
from azr_jax.models.vocabulary import ban

#: Most logits held at once, as a count of float32 (128 MiB). A 150k vocabulary then has chunks of about 220 tokens,
#: where the projection is just compute-bound on current accelerators; a tiny vocabulary needs a single chunk.
MAX_LOGITS = 1 << 25


def next_token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    targets: Array,
    temperature: float,
    max_logits: int = MAX_LOGITS,
    banned: Array | None = None,
) -> tuple[Array, Array]:
    """log p(target) and entropy of the distribution it was sampled from, both float32 [B, T], in nats.

    hidden [B, T, D] are final hidden states, targets int32 [B, T] the token that follows each position. Logits are
    divided by the temperature in float32, and `banned` tokens (bool [V]) have probability 0, exactly as in the sampler.
    At most `max_logits` logits exist at a time (and at least one column of B tokens). Chunks run along T, so rows stay
    on the devices that hold them.
    """
    b, t, d = hidden.shape
    chunk = min(t, max(1, max_logits // (b * config.vocab_size)))
    n = -(-t // chunk)

    def body(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = ban(unembed(params, config, hidden), banned) / temperature  # [B, C, V]
        log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, C]
        # A masked sum instead of a gather: it fuses, and it splits over a vocabulary that is sharded.
        chosen = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
        logprob = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - log_z
        logp = logits - log_z[..., None]
        return logprob, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    if n == 1:
        return body(hidden, targets)  # few enough to be kept for the backward pass
    pad = n * chunk - t
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(b, n, chunk, d).swapaxes(0, 1)  # [n, B, C, D]
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(b, n, chunk).swapaxes(0, 1)  # [n, B, C]
    step = jax.checkpoint(body)
    _, (logprob, entropy) = lax.scan(lambda _, x: (None, step(*x)), None, (hidden, targets))  # [n, B, C]
    return tuple(x.swapaxes(0, 1).reshape(b, n * chunk)[:, :t] for x in (logprob, entropy))
