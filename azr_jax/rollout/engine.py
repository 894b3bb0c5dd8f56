"""The rollout engine: requests come and go at any time, the device decodes whatever is there, block after block.

`submit` queues, `step` keeps the device going, `poll` hands out what is finished. Between two blocks the host only
moves slots and pages (scheduler.py); texts are read, and stop strings looked for, while the next block runs. All
programs are compiled before the first request (`warm_up`): one prefill for each padded length of prompts, one decode
for each width of table. A completion depends on its request and the weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from azr_jax.config import RolloutConfig
from azr_jax.models.config import ModelConfig
from azr_jax.models.tokenizer import Tokenizer
from azr_jax.models.transformer import Params
from azr_jax.rollout import sizing
from azr_jax.rollout.device import Device
from azr_jax.rollout.programs import Block, Slots
from azr_jax.rollout.request import Completion, Filters, Request
from azr_jax.rollout.sampling import Filtering
from azr_jax.rollout.scheduler import Plan, Scheduler
from azr_jax.rollout.scheduler import Sequence as Running
from azr_jax.rollout.weights import decode_mesh, weights_bytes

ENOUGH_SHARE = 8  # with requests waiting, a block ends early when one slot in 8 is done


@dataclass
class EngineStats:
    """Totals since the engine was made; seconds are of wall time."""

    sequences: int = 0
    tokens: int = 0  # of responses
    truncated: int = 0  # responses
    blocks: int = 0
    steps: int = 0  # of decoding, a token for every slot in use
    slot_steps: int = 0  # slots times decode steps, used or not
    read_tokens: int = 0  # tokens in the cache of the sequences in flight, summed over decode steps
    prefilled: int = 0  # prompts
    shared: int = 0  # prompts that were there already
    preempted: int = 0  # sequences that had to start over
    device_seconds: float = 0.0  # the device had work of ours
    wait_seconds: float = 0.0  # of these, the host had none
    plan_seconds: float = 0.0
    launch_seconds: float = 0.0
    read_seconds: float = 0.0


@dataclass
class _Flight:
    """A block on the device, and when it was launched and will have been ready."""

    sequences: list[Running]
    block: Block
    launched: float
    ready: Future[float]


@dataclass
class Engine:
    """Generates completions. `stop` are strings that end a response (besides the tokenizer's end-of-sequence ids).

    mesh: any mesh; the engine decodes on those of its devices that belong to this host. dtype: of the weights it keeps.
    attention: "xla", "splash" or "cudnn" (see models/attention_choice.py).
    """

    model: ModelConfig
    config: RolloutConfig
    tokenizer: Tokenizer
    mesh: Mesh
    stop: tuple[str, ...] = ()
    attention: str = "xla"
    dtype: str = "float32"
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        local = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        mesh = decode_mesh(self.model, sorted(local, key=lambda d: d.id))
        shards = int(mesh.shape["data"])
        slots = sizing.slots(self.config, shards)
        eos = self.tokenizer.eos_ids
        self._device = Device(self.model, self.config, mesh, slots, eos, self.attention, self.dtype)
        self._scheduler: Scheduler | None = None
        self._version = 0
        self._live: dict[object, Running] = {}
        self._flight: _Flight | None = None
        self._done: dict[object, Completion] = {}
        self._device_ready = 0.0  # when the last block was
        # Knows when a block is ready while this thread does other things.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    # Weights

    def ban(self, tokens: jax.Array | np.ndarray) -> None:
        """Never sample these tokens, bool [V]; before `warm_up`."""
        self._device.ban(np.asarray(tokens))

    def load(self, params: Params, version: int = 0) -> None:
        """Sample from `params` (the learner's, any mesh and dtype) from now on; the cache starts empty.

        ValueError while requests are under way: a rollout is of one version of the weights.
        """
        if self._live:
            raise ValueError("the engine is busy: its weights cannot change")
        if not self._device.holds(params):
            self.release()
            self._device.load(params)
        self._version = version

    def release(self) -> None:
        """Give up weights and cache, so that the learner has the memory. ValueError while requests are under way."""
        if self._live:
            raise ValueError("the engine is busy: its weights cannot go")
        if self._scheduler is not None:
            self._scheduler.forget_prefixes()
        self._flight = None
        self._device.release()

    def warm_up(self) -> None:
        """Compile all programs, with progress in the log; `load` comes first."""
        self._device.warm_up()

    # Requests

    def bytes_read(self, stats: EngineStats) -> float:
        """What each device had to read for the decode steps in `stats`: weights, and keys and values of sequences."""
        mesh = self._device.mesh
        token = self._device.layout.bytes_per_page(self.model) / self.config.page
        weights = weights_bytes(self.model, self.dtype) / mesh.shape["tensor"]
        return float(stats.steps * weights + stats.read_tokens * token / mesh.size)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt is within max_prompt."""
        return 0 < len(prompt) <= self.config.max_prompt

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, all or none.

        ValueError: a prompt that is empty or longer than max_prompt, max_tokens below 1, a negative temperature, an id
        that is under way; or no weights were loaded.
        """
        if not self._device.loaded:
            raise ValueError("the engine has no weights: `load` comes first")
        requests = list(requests)
        new: set[object] = set()
        for request in requests:
            if not self.fits(request.prompt):
                raise ValueError(f"a prompt has {len(request.prompt)} tokens, not 1 to {self.config.max_prompt}")
            if request.max_tokens is not None and request.max_tokens < 1:
                raise ValueError(f"max_tokens = {request.max_tokens} must be 1 or more")
            if not request.temperature >= 0:
                raise ValueError(f"temperature = {request.temperature} must be 0 or more")
            if request.id in new or request.id in self._live or request.id in self._done:
                raise ValueError(f"a request with id {request.id!r} is under way already")
            new.add(request.id)
        if self._scheduler is None:
            device = self._device
            each, layout = device.slots // device.shards, device.layout
            self._scheduler = Scheduler(each, layout.pages, layout.page, self.config.block, device.shards)
        for request in requests:
            limit = min(request.max_tokens or self.config.max_response, self.config.max_response)
            self._live[request.id] = self._scheduler.submit(request, limit)

    def cancel(self, ids: Iterable[object]) -> None:
        """Forget requests; ids that are unknown are left alone. Nothing is handed out for them."""
        for name in ids:
            self._done.pop(name, None)
            sequence = self._live.pop(name, None)
            if sequence is not None and not sequence.ended:
                assert self._scheduler is not None
                self._scheduler.end(sequence)

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self._live)

    def poll(self) -> dict[object, Completion]:
        """What finished since the last call, by request id."""
        done, self._done = self._done, {}
        return done

    def step(self) -> None:
        """Wait for the block that runs, launch the next one, read texts meanwhile. To be called while `busy`.

        After an exception nothing is under way, and `load` comes first again.
        """
        if self._scheduler is None:
            raise ValueError("nothing was submitted")
        try:
            self._step(self._scheduler)
        except BaseException:
            self.abandon()  # pages may be planned that were never written
            raise

    def abandon(self) -> None:
        """Forget all requests and give up weights and cache: nothing of what was under way can be seen again."""
        self._live, self._done = {}, {}
        self._flight = self._scheduler = None
        self._device.release()

    def _step(self, scheduler: Scheduler) -> None:
        landed = self._land()
        started = time.monotonic()
        plan = scheduler.plan()
        planned = time.monotonic()
        self._launch(plan)
        launched = time.monotonic()
        self._read(landed)
        self.stats.plan_seconds += planned - started
        self.stats.launch_seconds += launched - planned
        self.stats.read_seconds += time.monotonic() - launched

    def generate(self, params: Params, requests: Iterable[Request]) -> list[Completion]:
        """Completions in the order of requests, whose ids are replaced. ValueError as `submit`, or if requests wait."""
        self.load(params, self._version)
        if self._live or self._done:
            raise ValueError("the engine is busy with other requests")
        numbered = [replace(request, id=i) for i, request in enumerate(requests)]
        self.submit(numbered)
        while self.busy:
            self.step()
        done = self.poll()
        return [done[i] for i in range(len(numbered))]

    def text(self, completion: Completion) -> str:
        """A response for the parser. The token that completed a stop string may say more; that is cut off here only."""
        text = self.tokenizer.decode(completion.tokens)
        if completion.finish != "stop":
            return text
        return text[: min(text.index(stop) + len(stop) for stop in self.stop if stop in text)]

    # A block

    def _land(self) -> list[Running]:
        """Wait for the block that runs and note what it brought; returns the sequences it was for."""
        if self._flight is None:
            return []
        flight, self._flight = self._flight, None
        started = time.monotonic()
        ready = flight.ready.result()
        block = jax.device_get(flight.block)
        stats = self.stats
        stats.wait_seconds += time.monotonic() - started
        stats.device_seconds += ready - max(flight.launched, self._device_ready)
        self._device_ready = ready
        stats.blocks += 1
        stats.steps += int(block.steps)
        stats.slot_steps += self._device.slots * int(block.steps)
        assert self._scheduler is not None
        for sequence in flight.sequences:
            if sequence.ended:  # cancelled, or a stop string was found while the block ran
                continue
            n, slot = int(block.counts[sequence.slot]), sequence.slot
            stats.read_tokens += n * sequence.position + n * (n + 1) // 2
            sequence.tokens += block.tokens[slot, :n].tolist()
            sequence.logprobs += block.logprobs[slot, :n].tolist()
            sequence.eos = bool(block.eos[slot])
            if sequence.eos or len(sequence.tokens) == sequence.limit:
                self._scheduler.end(sequence)
        return flight.sequences

    def _launch(self, plan: Plan) -> None:
        """Queue prefills, copies and a block of decoding on the device."""
        assert self._scheduler is not None
        for name, count in self._scheduler.counts.items():
            setattr(self.stats, name, count)
        if not plan.running:
            return
        self._device.prefill(plan.prefills)
        if plan.copies:
            self._device.copy(plan.copies)
        running = plan.running
        waiting = self._scheduler.waiting > 0
        enough = max(1, self._device.slots // ENOUGH_SHARE) if waiting else len(running)
        block = self._device.decode(self._slots(running), min(enough, len(running)), self._filtering(running))
        # What the device does before all is queued is not counted as busy: nobody here knows when it began.
        self._flight = _Flight(running, block, time.monotonic(), self._watcher.submit(_ready, block))

    def _slots(self, running: list[Running]) -> Slots:
        b, most = self._device.slots, max(len(sequence.pages) for sequence in running)
        width = min(width for width in self._device.widths if width >= most)
        i32: Any = np.int32
        token, generated, position = np.zeros(b, i32), np.zeros(b, i32), np.full(b, -1, i32)
        limit, key, temperature = np.ones(b, i32), np.zeros((b, 2), np.uint32), np.ones(b, np.float32)
        table = np.zeros((b, width), i32)
        for s in running:
            token[s.slot], position[s.slot], generated[s.slot] = s.newest, s.position, len(s.tokens)
            limit[s.slot], key[s.slot], temperature[s.slot] = s.limit, s.request.key, s.request.temperature
            table[s.slot, : len(s.pages)] = s.pages
        arrays: Any = (token, position, generated, limit, key, temperature, table)
        return Slots(*arrays)

    def _filtering(self, running: list[Running]) -> Filtering | None:
        """The filters of all slots, if any has some."""
        if all(sequence.request.filters in (None, Filters()) for sequence in running):
            return None
        b, v = self._device.slots, self.model.vocab_size
        names = ("top_k", "top_p", "min_p", "repetition", "presence", "frequency")
        none, dtype = Filters(), {"top_k": np.int32}
        values = {name: np.full(b, getattr(none, name), dtype.get(name, np.float32)) for name in names}
        prompt, response = np.zeros((b, v), bool), np.zeros((b, v), np.int32)
        for s in running:
            if s.request.filters is None:
                continue
            for name in names:
                values[name][s.slot] = getattr(s.request.filters, name)
            prompt[s.slot, list(s.request.prompt)] = True
            np.add.at(response[s.slot], s.tokens, 1)
        arrays: Any = (*values.values(), prompt, response)
        return Filtering(*arrays)

    # Texts

    def _read(self, landed: list[Running]) -> None:
        """Look for stop strings in what a block brought and hand out what is finished."""
        assert self._scheduler is not None
        for sequence in landed:
            if self._live.get(sequence.request.id) is not sequence:
                continue  # handed out or cancelled
            cut = self._stop_cut(sequence) if self.stop else None
            if cut is not None:
                self._hand_out(sequence, cut, "stop")
            elif sequence.ended:
                self._hand_out(sequence, len(sequence.tokens), "eos" if sequence.eos else "length")

    def _hand_out(self, sequence: Running, n: int, finish: Any) -> None:
        assert self._scheduler is not None
        if not sequence.ended:
            self._scheduler.end(sequence)
        del self._live[sequence.request.id]
        tokens = np.asarray(sequence.tokens[:n], np.int32)
        logprobs = np.asarray(sequence.logprobs[:n], np.float32)
        self._done[sequence.request.id] = Completion(tokens, logprobs, finish, self._version)
        self.stats.sequences += 1
        self.stats.tokens += n
        self.stats.truncated += finish == "length"

    def _stop_cut(self, sequence: Running) -> int | None:
        """The number of tokens up to the one that completed a stop string, if there is one."""
        ids, seen = sequence.tokens, sequence.read
        sequence.read = len(ids)
        # What came before was searched before; a stop string may begin in it. A token may be part of a character, or
        # nothing at all, so as many are taken as give text enough: blocks may end anywhere and must not matter.
        longest = max(map(len, self.stop))
        back = min(seen, 2 * longest)
        while back < seen and len(self.tokenizer.decode(ids[seen - back : seen])) < 2 * longest:
            back = min(seen, 2 * back)
        tail = self.tokenizer.decode(ids[seen - back :])
        if not any(stop in tail for stop in self.stop):
            return None
        low, high = 1, len(ids)  # text only grows with tokens, so bisection finds the first complete prefix
        while low < high:
            middle = (low + high) // 2
            text = self.tokenizer.decode(ids[:middle])
            low, high = (low, middle) if any(stop in text for stop in self.stop) else (middle + 1, high)
        return low


def _ready(block: Block) -> float:
    """When a block was ready."""
    jax.block_until_ready(block)
    return time.monotonic()
