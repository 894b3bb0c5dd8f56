"""The sampler: any number of requests through fixed batches, on whatever mesh holds the weights.

Requests are sorted into batches by prompt length. A batch is prefilled (each distinct prompt once), then decoded in
blocks; between blocks the host collects finished rows and, when few are left, moves the rest into a smaller batch, so
that one long response does not keep a whole batch running. Shapes come from a short list, so compiled programs are
reused. Not here yet: refilling freed rows, a paged cache, one stream for all roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from azr_jax.config import RolloutConfig
from azr_jax.models.attention import attend
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import Tokenizer
from azr_jax.models.transformer import Attend, Params
from azr_jax.rollout.decode import DecodeState, decode, keep_rows, start
from azr_jax.rollout.request import Completion, Request

PROMPT_BUCKETS = 2  # prompts are padded to max_prompt or half of it
SMALLEST_BATCH_SHARE = 8  # batches come in config.batch / 1, 2, 4 and 8 rows


@dataclass
class EngineStats:
    """Totals since the engine was made."""

    tokens: int = 0
    sequences: int = 0
    truncated: int = 0


@dataclass
class Engine:
    """Generates completions. `stop` are strings that end a response (besides the tokenizer's end-of-sequence ids).

    `attend` computes attention over prompts (see models/attention.py). `banned`, bool [V], are tokens never sampled.
    """

    model: ModelConfig
    config: RolloutConfig
    tokenizer: Tokenizer
    mesh: Mesh
    stop: tuple[str, ...] = ()
    attend: Attend = attend
    banned: jax.Array | None = None
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        smallest = max(1, self.config.batch // SMALLEST_BATCH_SHARE)
        self._sizes = [self.config.batch]
        while self._sizes[-1] // 2 >= smallest:
            self._sizes.append(self._sizes[-1] // 2)
        half = -(-self.config.max_prompt // PROMPT_BUCKETS)
        self._buckets = [half, self.config.max_prompt]
        self._eos = jnp.asarray(sorted(self.tokenizer.eos_ids), jnp.int32)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt is within max_prompt."""
        return 0 < len(prompt) <= self.config.max_prompt

    def generate(self, params: Params, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of requests. ValueError: a prompt that is empty or longer than max_prompt."""
        for request in requests:
            if not self.fits(request.prompt):
                raise ValueError(f"a prompt has {len(request.prompt)} tokens, not 1 to {self.config.max_prompt}")
        done: dict[int, Completion] = {}
        for bucket, low in zip(self._buckets, [0, self._buckets[0]], strict=True):
            chosen = [i for i, r in enumerate(requests) if low < len(r.prompt) <= bucket]
            chosen.sort(key=lambda i: requests[i].prompt)  # samples of one prompt side by side share its prefill
            for first in range(0, len(chosen), self.config.batch):
                self._run_batch(params, bucket, chosen[first : first + self.config.batch], requests, done)
        self.stats.sequences += len(requests)
        return [done[i] for i in range(len(requests))]

    def text(self, completion: Completion) -> str:
        """A response for the parser. The token that completed a stop string may say more; that is cut off here only."""
        text = self.tokenizer.decode(completion.tokens)
        if completion.finish != "stop":
            return text
        return text[: min(text.index(stop) + len(stop) for stop in self.stop if stop in text)]

    def _size_for(self, rows: int) -> int:
        return min(size for size in self._sizes if size >= rows)

    def _place(self, array: np.ndarray) -> jax.Array:
        """Split rows over the data and fsdp axes where they divide, else replicate."""
        axes = ("data", "fsdp")
        split = array.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(axes) if split else PartitionSpec()))

    def _start(self, params: Params, bucket: int, batch: list[Request], size: int) -> DecodeState:
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in batch))}
        unique = size if len(distinct) > max(1, size // SMALLEST_BATCH_SHARE) else max(1, size // SMALLEST_BATCH_SHARE)
        prompts = np.full((unique, bucket), self.tokenizer.pad_id, np.int32)
        padding = np.full(unique, bucket - 1, np.int32)
        for prompt, i in distinct.items():
            prompts[i, bucket - len(prompt) :] = prompt
            padding[i] = bucket - len(prompt)
        source, key = np.zeros(size, np.int32), np.zeros((size, 2), np.uint32)
        temperature, live = np.ones(size, np.float32), np.zeros(size, bool)
        for row, request in enumerate(batch):
            source[row], key[row] = distinct[request.prompt], request.key
            temperature[row], live[row] = request.temperature, True
        arrays = [self._place(x) for x in (prompts, padding, source, key, temperature, live)]
        most = self.config.max_response
        return start(params, self.model, *arrays, self._eos, most, self.attend, self.banned)

    def _run_batch(
        self, params: Params, bucket: int, chosen: list[int], requests: Sequence[Request], done: dict[int, Completion]
    ) -> None:
        size = self._size_for(len(chosen))
        state = self._start(params, bucket, [requests[i] for i in chosen], size)
        rows: list[tuple[int, int]] = list(enumerate(chosen))  # (row of the batch, request index) still running
        while rows:
            length, finished = jax.device_get((state.length, state.done))
            stopped = self._stopped(state, rows) if self.stop else {}
            ended = [row for row, _ in rows if finished[row] or row in stopped]
            if ended:
                tokens, logprobs = jax.device_get((state.tokens, state.logprobs))
                for row, index in rows:
                    if finished[row] or row in stopped:
                        n = stopped.get(row, int(length[row]))
                        done[index] = self._complete(tokens[row, :n].copy(), logprobs[row, :n].copy(), row in stopped)
                gone = set(ended)
                rows = [(row, index) for row, index in rows if row not in gone]
                if not rows:
                    return
                smaller = self._size_for(len(rows))
                if smaller < size or stopped:
                    state, rows, size = self._shrink(state, rows, smaller), list(enumerate(i for _, i in rows)), smaller
            state = decode(params, self.model, state, self._eos, self.config.block, self.banned)

    def _shrink(self, state: DecodeState, rows: list[tuple[int, int]], size: int) -> DecodeState:
        index, live = np.zeros(size, np.int32), np.zeros(size, bool)
        index[: len(rows)] = [row for row, _ in rows]
        live[: len(rows)] = True
        return keep_rows(state, self._place(index), self._place(live))

    def _complete(self, tokens: np.ndarray, logprobs: np.ndarray, stopped: bool) -> Completion:
        self.stats.tokens += len(tokens)
        if stopped:
            return Completion(tokens, logprobs, "stop")
        if int(tokens[-1]) in self.tokenizer.eos_ids:
            return Completion(tokens, logprobs, "eos")
        self.stats.truncated += 1
        return Completion(tokens, logprobs, "length")

    def _stopped(self, state: DecodeState, rows: list[tuple[int, int]]) -> dict[int, int]:
        """Rows whose text holds a stop string, with the number of tokens up to the one that completed it."""
        tokens, length = jax.device_get((state.tokens, state.length))
        cut: dict[int, int] = {}
        for row, _ in rows:
            ids = tokens[row, : length[row]]
            # What came before the last block was searched after earlier ones; a stop string may begin in it.
            tail = self.tokenizer.decode(ids[-(self.config.block + 2 * max(map(len, self.stop))) :])
            if any(stop in tail for stop in self.stop):
                low, high = 1, len(ids)  # text only grows with tokens, so bisection finds the first complete prefix
                while low < high:
                    middle = (low + high) // 2
                    text = self.tokenizer.decode(ids[:middle])
                    low, high = (low, middle) if any(stop in text for stop in self.stop) else (middle + 1, high)
                cut[row] = low
        return cut
