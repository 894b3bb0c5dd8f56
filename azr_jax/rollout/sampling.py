"""From logits to a token: temperature, one uniform number a token, and the log-probability the learner will divide by.

A token is drawn by inverting the cumulative distribution, in two levels: first a group of tokens, then one of the
group. That takes one random number a row where the Gumbel trick takes one for each entry of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

GROUP = 128  # tokens of a group: the vocabulary is read once for the sums of groups, then one group of a row


class Filtering(NamedTuple):
    """`request.Filters` of every row, as arrays [B], and what the penalties need: counts of tokens seen."""

    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    repetition: Array  # float32
    presence: Array  # float32
    frequency: Array  # float32
    prompt: Array  # bool [B, V], tokens of the prompt
    response: Array  # int32 [B, V], how often each token was generated


def uniform(key: Array, position: Array) -> Array:
    """float32 [B] in [0, 1): for response token `position` [B] of requests with `key` uint32 [B, 2]."""

    def one(key: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(key, position)


def sample(logits: Array, key: Array, position: Array, temperature: Array) -> tuple[Array, Array]:
    """A token for each row: logits float32 [B, V] -> token int32 [B], log-probability float32 [B].

    position int32 [B] counts response tokens, temperature float32 [B]. The log-probability is that of the tempered
    distribution, logit / T - logsumexp(logits / T). Temperature 0 takes the argmax and reports temperature 1.
    """
    greedy = temperature == 0.0
    # Distance from the likeliest first: divided before, large logits or low temperatures would leave rounding errors.
    top = jnp.max(logits, axis=-1, keepdims=True)
    scaled = (logits - top) / jnp.where(greedy, 1.0, temperature)[:, None]
    drawn, total = _invert(jnp.exp(scaled), uniform(key, position))  # the largest weight is 1
    # The first that equals the largest: what argmax gives, but XLA on CPU makes a slow scalar loop of that.
    columns = jnp.arange(logits.shape[1], dtype=jnp.int32)
    likeliest = jnp.min(jnp.where(logits == top, columns, logits.shape[1] - 1), axis=-1)
    token = jnp.where(greedy, likeliest, drawn).astype(jnp.int32)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - jnp.log(total)


def _invert(weights: Array, at: Array) -> tuple[Array, Array]:
    """The first token whose cumulative weight exceeds `at` [B] of the total: index int [B], total float32 [B].

    weights float32 [B, V], not normalised. A token of weight 0 is never returned, whatever rounding does.
    """
    b, v = weights.shape
    groups = jnp.pad(weights, ((0, 0), (0, -v % GROUP))).reshape(b, -1, GROUP)  # [B, V / GROUP, GROUP]
    sums = jnp.sum(groups, axis=-1)  # [B, V / GROUP]
    ends = jnp.cumsum(sums, axis=-1)
    total = ends[:, -1]
    goal = at * total
    group = _first_above(ends, sums, goal)
    before = jnp.take_along_axis(ends - sums, group[:, None], axis=-1)[:, 0]
    inside = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]  # [B, GROUP]
    return group * GROUP + _first_above(jnp.cumsum(inside, axis=-1), inside, goal - before), total


def _first_above(ends: Array, parts: Array, goal: Array) -> Array:
    """The first column of `ends` [B, N], running sums of `parts`, above goal [B]; the last that has a part if none."""
    last = parts.shape[1] - 1 - jnp.argmax(parts[:, ::-1] > 0, axis=-1)
    return _some_part(parts, jnp.minimum(jnp.sum(ends <= goal[:, None], axis=-1), last))


def _some_part(parts: Array, column: Array) -> Array:
    """The first column from `column` on that has a part: rounding of running sums may point at one that has none."""
    columns = jnp.arange(parts.shape[1])
    return jnp.argmax((parts > 0) & (columns >= column[:, None]), axis=-1)


def filter_logits(logits: Array, filtering: Filtering, temperature: Array) -> Array:
    """Logits float32 [B, V] after penalties, with -inf where top-k, top-p or min-p leave a token out.

    The last two judge the tempered distribution; greedy rows (temperature 0) are judged at 1. The likeliest token
    always stays. Ties with the last token that stays, stay.
    """
    f = filtering
    seen = f.prompt | (f.response > 0)
    scaled = jnp.where(logits > 0, logits / f.repetition[:, None], logits * f.repetition[:, None])
    logits = jnp.where(seen, scaled, logits)
    logits = logits - f.presence[:, None] * (f.response > 0) - f.frequency[:, None] * f.response
    tempered = logits / jnp.where(temperature == 0.0, 1.0, temperature)[:, None]
    probability = jax.nn.softmax(tempered, axis=-1)
    ordered = jnp.sort(probability, axis=-1)[:, ::-1]  # [B, V], likeliest first
    v = logits.shape[1]
    kth = jnp.take_along_axis(ordered, jnp.where(f.top_k > 0, jnp.minimum(f.top_k, v), v)[:, None] - 1, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # of the likelier tokens together
    in_nucleus = jnp.where(f.top_p < 1.0, jnp.maximum(jnp.sum(before < f.top_p[:, None], axis=-1), 1), v)
    nucleus = jnp.take_along_axis(ordered, in_nucleus[:, None] - 1, axis=-1)
    least = jnp.maximum(jnp.maximum(kth, nucleus), f.min_p[:, None] * ordered[:, :1])
    return jnp.where(probability >= least, logits, -jnp.inf)
