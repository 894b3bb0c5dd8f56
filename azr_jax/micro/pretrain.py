"""Pretraining the embedded model from nothing: tokenizer, corpus, weights. One command, one seed, one CPU.

Not part of self-play. The recipe: small frequent batches (16 rows of 128 tokens an update), AdamW decayed to zero
along a cosine, and most of the loss on the short responses.
"""

from __future__ import annotations

import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from random import Random
from tempfile import TemporaryDirectory
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import optax

from azr_jax.errors import UserError
from azr_jax.micro.corpus import Rows, examples, pack_rows, train_tokenizer
from azr_jax.models.config import ModelConfig
from azr_jax.models.rope import Rope
from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.models.transformer import Params, forward, init_params, unembed
from azr_jax.models.weights import save_weights

log = logging.getLogger(__name__)

ROWS, ROW_TOKENS = 16, 128
PEAK_LR, WARMUP = 1.5e-3, 300
POOL = 1500  # examples packed together, about 480 rows


def embedded_config(vocab_size: int) -> ModelConfig:
    """The embedded model: Qwen2.5's architecture at 0.8 M parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=Rope(10000.0),
    )


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Rows]:
    """Endless batches of ROWS packed rows; the same for the same seed."""
    stream, rng = examples(seed), Random(seed)
    (eos,) = tokenizer.eos_ids
    while True:
        pool = [next(stream) for _ in range(POOL)]
        encoded = [(tokenizer.encode(e.prompt), [*tokenizer.encode(e.response), eos], e.forced) for e in pool]
        rows = pack_rows(encoded, ROW_TOKENS)
        order = list(range(len(rows.tokens)))
        rng.shuffle(order)
        for start in range(0, len(order) - ROWS + 1, ROWS):
            index = order[start : start + ROWS]
            yield Rows(rows.tokens[index], rows.positions[index], rows.segments[index], rows.weights[index])


def prefetch(stream: Iterator[Rows], depth: int = 64) -> Iterator[Rows]:
    """Run `stream` in a thread, `depth` batches ahead: XLA computes outside the interpreter lock."""
    queue: Queue[Rows | Exception] = Queue(depth)

    def fill() -> None:
        try:
            for batch in stream:
                queue.put(batch)
        except Exception as error:  # raised again where the batch is missed
            queue.put(error)

    Thread(target=fill, daemon=True).start()
    while not isinstance(item := queue.get(), Exception):
        yield item
    raise item


def loss_fn(params: Params, config: ModelConfig, rows: Rows) -> jax.Array:
    """Weighted mean negative log-likelihood of packed rows."""
    tokens, positions, segments, weights = map(jnp.asarray, rows)
    hidden = forward(params, config, tokens, positions, segments)
    logits = unembed(params, config, hidden)[:, :-1]  # [B, T - 1, V]
    weights = weights[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(loss * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def train(config: ModelConfig, tokenizer: Tokenizer, updates: int, seed: int) -> Params:
    """Weights after `updates` updates."""
    params = init_params(config, seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, min(WARMUP, updates // 10), updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    def update(params: Params, opt_state: optax.OptState, rows: Rows) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(params, config, rows)
        steps, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, steps), opt_state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    opt_state, started, losses = optimizer.init(params), time.monotonic(), []
    for number, rows in zip(range(1, updates + 1), prefetch(batches(tokenizer, seed)), strict=False):
        params, opt_state, loss = compiled(params, opt_state, rows)
        losses.append(loss)
        if number % 500 == 0 or number == updates:
            seconds = time.monotonic() - started
            rate = number * ROWS * ROW_TOKENS / seconds
            mean = float(np.mean(jax.device_get(losses)))
            log.info("update %d/%d  loss %.4f  %.0f tokens/s  %.1f min", number, updates, mean, rate, seconds / 60)
            losses = []
    return params


def pretrain_command(args: Namespace) -> int:
    """`azr-jax pretrain --out DIR [--updates N] [--seed S] [--overwrite]`: rebuild the embedded model.

    Everything is made in a temporary folder first: an interrupted rebuild leaves what was in DIR as it was.
    """
    out = Path(args.out)
    if args.updates < 1:
        raise UserError("pretrain: --updates must be at least 1", exit_code=2)
    if out.is_dir() and any(out.iterdir()) and not args.overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or add --overwrite", exit_code=2)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".pretrain-", dir=out) as folder:
            _rebuild(Path(folder), args.updates, args.seed)
            for file in Path(folder).iterdir():
                os.replace(file, out / file.name)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    log.info("wrote %s", out)
    return 0


def _rebuild(folder: Path, updates: int, seed: int) -> None:
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}) + "\n")
    tokenizer = load_tokenizer(folder)
    config = embedded_config(tokenizer.vocab_size)
    log.info("pretraining %d parameters, %d updates of %d tokens", config.num_params, updates, ROWS * ROW_TOKENS)
    save_weights(folder, config, jax.device_get(train(config, tokenizer, updates, seed)))
