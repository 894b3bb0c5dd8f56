"""Vocabulary rows that look untrained: a warning at load, and a ban on request.

Checkpoints have rows for tokens that no training text held: padding beyond the tokenizer, reserved tokens, tags that
only a later model uses (`<think>` in Qwen3 base). Sampled once, such a token sends a model astray, and a program that
prompts with one asks for nothing the model knows. A row of the embedding or of the output projection looks untrained if

- it is nearly zero,
- it is the same as another row: two tokens that were trained are never exactly alike,
- it points where the padding rows point, all in one direction (as the gradient of the softmax leaves rows that are
  never a target: Land and Bartolo, "Fishing for Magikarp", arXiv 2405.05417, use the same reference), at about their
  length. Where padding rows are random vectors, nothing can be said this way.

Statistics are computed on the devices that hold the rows; a few numbers for each row come to the host.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from azr_jax.dist.mesh import replicated
from azr_jax.errors import UserError
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NEAR_ZERO = 0.02  # of the median row's norm
SAME = 1e-2  # grid of directions, in norms, on which equal rows meet; distinct rows differ by about 1
PROJECTIONS = 16
ALIGNED = 0.9  # least cosine of every padding row with their mean, for the mean to say anything
#: Logit of a banned token: its probability is exactly 0, and 0 times its log-probability still a number.
BANNED_LOGIT = -1e30


def ban(logits: jax.Array, banned: jax.Array | None) -> jax.Array:
    """Logits [..., V] with those of banned (bool [V]) tokens out of reach. Sampler and learner both call this."""
    return logits if banned is None else jnp.where(banned, BANNED_LOGIT, logits)


def check_sizes(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """UserError if the tokenizer has text tokens without a row; for added ones (Gemma's image token) a warning.

    More rows than tokens are usual: vocabularies are padded to a round number.
    """
    beyond = {name: i for name, i in tokenizer.ids.items() if i >= config.vocab_size}
    if set(beyond) <= tokenizer.added.keys() and not {*tokenizer.eos_ids, *tokenizer.prefix} & set(beyond.values()):
        if beyond:
            log.warning("the model has no embedding for %s; no prompt may hold it", ", ".join(sorted(beyond)))
        return
    raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} tokens, the model embeddings for {config.vocab_size} "
        f"(without one: {_some(sorted(beyond))}); tokenizer and weights are not of the same model"
    )


def untrained_rows(params: dict, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> NDArray[np.bool_]:
    """bool [V]: rows that look untrained, in the embedding or in the output projection."""
    unused = np.ones(config.vocab_size, bool)
    unused[[i for i in tokenizer.ids.values() if i < config.vocab_size]] = False
    found = _untrained(params["embed"], unused, mesh)
    return found if config.tie_word_embeddings else found | _untrained(params["lm_head"].T, unused, mesh)


def _untrained(rows: jax.Array, unused: NDArray[np.bool_], mesh: Mesh) -> NDArray[np.bool_]:
    """`untrained_rows` of one matrix [V, D]."""
    statistics = jax.jit(_statistics, out_shardings=replicated(mesh))(rows, unused)
    norms, cosines, projections = (np.asarray(x) for x in jax.device_get(statistics))
    found = norms <= NEAR_ZERO * np.median(norms[~unused])
    grid = np.round(projections / np.maximum(norms, np.finfo(np.float32).tiny)[:, None] / SAME).astype(np.int64)
    grid = np.column_stack([grid, np.round(norms / np.median(norms) / SAME).astype(np.int64)])
    _, group, size = np.unique(grid, axis=0, return_inverse=True, return_counts=True)
    found |= size[group.ravel()] > 1
    if unused.sum() > 1 and cosines[unused].min() >= ALIGNED:
        usual = np.median(norms[unused])
        found |= (cosines >= cosines[unused].min()) & (norms > usual / 2) & (norms < usual * 2)
    return found


def _statistics(rows: jax.Array, unused: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of rows [V, D]: norms [V], cosines with the mean direction of unused rows [V], projections [V, PROJECTIONS]."""
    rows = rows.astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1)
    mean = jnp.where(unused, 1 / jnp.maximum(norms, 1e-30), 0.0) @ rows  # [D]
    cosines = rows @ mean / jnp.maximum(norms * jnp.linalg.norm(mean), 1e-30)
    directions = jax.random.normal(jax.random.key(0), (rows.shape[1], PROJECTIONS))
    return norms, cosines, rows @ directions


def audit(
    params: dict, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh, ban_untrained: bool = False
) -> jax.Array | None:
    """Check sizes, warn of named tokens that look untrained, and return what the sampler must not sample.

    bool [V] on all devices if `ban_untrained`, else None. Banned are the rows that look untrained and those without a
    token, but never the tokens that end a response.
    """
    check_sizes(tokenizer, config)
    untrained = untrained_rows(params, config, tokenizer, mesh)
    known = {name: i for name, i in tokenizer.ids.items() if i < config.vocab_size}
    suspects = [name for name, i in known.items() if untrained[i]]
    named = sorted(name for name in suspects if name in tokenizer.added or name in tokenizer.control)
    if suspects:
        log.warning(
            "%d of %d tokens have rows that look untrained%s%s",
            len(suspects),
            len(known),
            f", among them {_some(named)}" if named else "",
            "; the sampler never draws them" if ban_untrained else "; rollout.ban_untrained_tokens=true bans them",
        )
    if not ban_untrained:
        return None
    if len(suspects) > len(known) // 2:
        raise UserError(
            f"{len(suspects)} of {len(known)} tokens look untrained: the weights are damaged, or this model cannot be "
            "judged by its rows; set rollout.ban_untrained_tokens=false"
        )
    banned = np.ones(config.vocab_size, bool)
    banned[list(known.values())] = untrained[list(known.values())]
    banned[list(tokenizer.eos_ids)] = False
    return jax.device_put(banned, replicated(mesh))


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
