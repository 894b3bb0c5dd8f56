"""`azr-jax score`: how likely a model finds given texts, token by token.

Reads JSON lines, `{"id", "tokens": [ids]}` or `{"id", "text"}`, and writes `{"id", "logprobs"}` in the same order: the
natural logarithm of the probability of every token given the tokens before it, at temperature 1; null for the first,
which has none. A text begins with what its tokenizer puts in front (of Llama and Gemma, a BOS); tokens are taken as
they are. The same forward pass and chunked log-probabilities as in training; in bfloat16 with the device's attention
kernel, which computes in no more than that, in float32 without. All lines are checked before anything is computed.

Lines are padded to a power of two and batched with others of their length, so few programs are compiled. Not here:
scores of whole texts (sums are the reader's), and several processes.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, row_sharding, row_shards
from azr_jax.errors import UserError
from azr_jax.learn.state import param_shardings
from azr_jax.learn.step import row_logprobs
from azr_jax.models.attention import attend
from azr_jax.models.attention_choice import choose_attention
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import Tokenizer, load_tokenizer
from azr_jax.models.weights import load_weights, model_folder

log = logging.getLogger(__name__)

SHORTEST_ROW = 64
#: Most tokens of a batch on each group of devices that shares rows, unless a single line is longer.
TOKENS_AT_ONCE = 8192
#: Lines that are sorted by length together and then written: what is computed before the first output.
WINDOW = 1024


class Item(NamedTuple):
    """One line of input: its number, for errors, its id and its tokens."""

    line: int
    id: Any
    tokens: np.ndarray  # int32 [T]


class Scorer:
    """Weights on all devices; `logprobs` scores token sequences."""

    def __init__(self, folder: Path, config: ModelConfig, dtype: str) -> None:
        """dtype: "float32" multiplies in float32 also where less would be the default; "bfloat16" is faster."""
        self.config = config
        self.mesh = make_mesh(MeshConfig())
        self.params = load_weights(folder, config, param_shardings(config, self.mesh), jnp.dtype(dtype))
        kind = "xla"
        if dtype == "bfloat16":
            windows = bool(config.sliding_layers)
            kind = choose_attention("auto", head_dim=config.head_dim, dtype=dtype, windows=windows)
        self._attend = partial(attend, kind=kind, mesh=self.mesh)
        self._precision = "highest" if dtype == "float32" else "default"
        self._compiled = jax.jit(self._rows)

    def logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 [T] for each int32 [T]: entry t about token t given those before; entry 0 is meaningless."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        for width, members in _batches([len(tokens) for tokens in sequences], row_shards(self.mesh)):
            tokens = np.zeros((width.rows, width.tokens), np.int32)  # [B, T]
            segments = np.zeros_like(tokens)
            for row, member in enumerate(members):
                n = len(sequences[member])
                tokens[row, :n], segments[row, :n] = sequences[member], 1
            positions = np.where(segments, np.arange(width.tokens, dtype=np.int32), 0)
            rows = {"tokens": tokens, "positions": positions, "segments": segments}
            with jax.default_matmul_precision(self._precision):
                scored = np.asarray(self._compiled(self.params, jax.device_put(rows, row_sharding(self.mesh))))
            for row, member in enumerate(members):
                results[member] = scored[row, : len(sequences[member])]
        return results

    def _rows(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        return row_logprobs(params, self.config, rows, 1.0, self.mesh, attend=self._attend)[0]


class Width(NamedTuple):
    """Shape of a batch."""

    rows: int
    tokens: int


def _batches(lengths: Sequence[int], shards: int) -> Iterator[tuple[Width, list[int]]]:
    """Batches of few shapes over all sequences: (shape, which sequences). Rows are a multiple of `shards`."""
    widths: dict[int, list[int]] = {}
    for member, length in enumerate(lengths):
        widths.setdefault(max(SHORTEST_ROW, _power_of_two(length)), []).append(member)
    for tokens, members in sorted(widths.items()):
        most = max(1, TOKENS_AT_ONCE // tokens) * shards
        for start in range(0, len(members), most):
            part = members[start : start + most]
            yield Width(min(most, _power_of_two(-(-len(part) // shards)) * shards), tokens), part


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def score_command(args: Namespace) -> int:
    """`azr-jax score`; returns the exit code. `args` are those of the command line (cli.py)."""
    folder = model_folder(args.model)
    config = ModelConfig.load(folder)
    items = read_items(args.file, config, folder)
    longest = max((len(item.tokens) for item in items), default=0)
    if longest > config.max_positions:
        log.warning("the longest line has %d tokens, the model was made for %d", longest, config.max_positions)
    if items:
        write_scores(Scorer(folder, config, args.dtype), items, sys.stdout)
    return 0


def write_scores(scorer: Scorer, items: Sequence[Item], out: TextIO) -> None:
    """One JSON line for each item, in order."""
    for start in range(0, len(items), WINDOW):
        window = items[start : start + WINDOW]
        for item, logprobs in zip(window, scorer.logprobs([item.tokens for item in window]), strict=True):
            if not np.isfinite(logprobs[1:]).all():
                raise UserError(f"line {item.line}: log-probabilities are not finite; are the weights damaged?")
            values = [None, *(float(str(value)) for value in logprobs[1:])]  # as many digits as a float32 has
            out.write(json.dumps({"id": item.id, "logprobs": values}) + "\n")
        out.flush()


def read_items(path: str, config: ModelConfig, folder: Path) -> list[Item]:
    """All lines of a file, or of standard input for "-"; empty ones are skipped. UserError names the first bad line.

    The tokenizer is loaded only if a line has text.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file of JSON lines, or - for stdin", 2) from None
    tokenizer = cache(lambda: load_tokenizer(folder))
    items = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                items.append(_item(number, line, config, tokenizer))
            except ValueError as error:
                name = "standard input" if path == "-" else path
                raise UserError(f"{name}, line {number}: {error}", exit_code=2) from None
    return items


def _item(number: int, line: bytes, config: ModelConfig, tokenizer: Callable[[], Tokenizer]) -> Item:
    """One line. ValueError says what is wrong with it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(fields, dict) or "id" not in fields or ("tokens" in fields) == ("text" in fields):
        raise ValueError('not of the form {"id": ..., "tokens": [...]} or {"id": ..., "text": "..."}')
    if "text" in fields:
        if not isinstance(fields["text"], str):
            raise ValueError("text is no string")
        tokens = list(tokenizer().prompt(fields["text"]))
    else:
        tokens = fields["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("tokens is no list of integers")
    if not tokens:
        raise ValueError("no tokens: there is nothing to score")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token {token} is out of range: the model has ids 0 to {config.vocab_size - 1}")
    return Item(number, fields["id"], np.array(tokens, np.int32))
