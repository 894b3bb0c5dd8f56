"""Which request gets which slot and which pages, block after block. Pure bookkeeping: no arrays, no device.

Requests wait in the order of their priority. A block of decoding needs pages for every token it may write; when pages
run out, prompts nobody continues are forgotten first, then the sequence admitted last is put back to wait, and starts
over later: with a key of its own it will say the same again. Slots and pages come in shards, one for each group of
devices that decodes its own part of the batch; a sequence lives in one shard.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

from azr_jax.rollout.pages import PagePool, Prefixes
from azr_jax.rollout.request import Request


@dataclass(eq=False)
class Sequence:
    """A request on its way, and what it said so far. `slot` is None while it has none."""

    request: Request
    order: int
    limit: int  # most response tokens
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    eos: bool = False  # the newest token is an end of sequence
    ended: bool = False
    read: int = 0  # response tokens in which stop strings were looked for

    @property
    def position(self) -> int:
        """Of the token that is fed next, which is the newest one; as many tokens are in the cache."""
        return len(self.request.prompt) - 1 + len(self.tokens)

    @property
    def newest(self) -> int:
        """The token that is fed next."""
        return self.tokens[-1] if self.tokens else self.request.prompt[-1]


@dataclass(frozen=True)
class Prefill:
    """A prompt whose keys and values are to be computed into `pages` of `shard`, all but its last token."""

    prompt: tuple[int, ...]
    shard: int
    pages: tuple[int, ...]


@dataclass
class Plan:
    """What the device does next, in this order."""

    prefills: list[Prefill] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # shard, from page, to page
    running: list[Sequence] = field(default_factory=list)


@dataclass
class _Shard:
    first_slot: int
    pool: PagePool
    prefixes: Prefixes
    free_slots: list[int]
    running: list[Sequence] = field(default_factory=list)  # in order of admission
    copied: list[int] = field(default_factory=list)  # held until the last plan's copies are made


class Scheduler:
    """Slots and pages for requests.

    slots and pages: of one shard; page: tokens of a page; block: most tokens a sequence gains between two plans.
    A sequence may take all pages of its shard, so there must be enough for the longest one: see `pages_for`.
    """

    def __init__(self, slots: int, pages: int, page: int, block: int, shards: int = 1) -> None:
        self._page, self._block = page, block
        self._shards = []
        for i in range(shards):
            pool = PagePool(pages)
            free = list(range((i + 1) * slots - 1, i * slots - 1, -1))
            self._shards.append(_Shard(i * slots, pool, Prefixes(pool), free))
        self._slots = slots
        self._waiting: list[tuple[float, int, Sequence]] = []
        self._live: dict[int, Sequence] = {}  # by order, waiting and running
        self._orders = 0
        self.counts: Counter[str] = Counter()  # prefilled, shared (prompts), preempted (sequences)

    @staticmethod
    def pages_for(longest: int, page: int) -> int:
        """Fewest pages of a shard for sequences of `longest` tokens: its own, one of its prompt's, and page 0."""
        return -(-longest // page) + 2

    def submit(self, request: Request, limit: int) -> Sequence:
        """Queue a request for at most `limit` response tokens."""
        sequence = Sequence(request, self._orders, limit)
        self._orders += 1
        self._live[sequence.order] = sequence
        self._queue(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        """A sequence is finished or cancelled, running or waiting: its slot and pages are free. Once only."""
        if sequence.ended:
            raise ValueError(f"sequence {sequence.order} ended twice")
        sequence.ended = True
        del self._live[sequence.order]
        if sequence.slot is not None:
            self._vacate(sequence)

    def forget_prefixes(self) -> None:
        """Flush what was prefilled: the weights changed. Only while nothing runs."""
        if self.running:
            raise ValueError("weights cannot change while sequences run")
        for shard in self._shards:
            shard.prefixes.clear()

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return sum(len(shard.running) for shard in self._shards)

    @property
    def waiting(self) -> int:
        """Sequences that have none."""
        return len(self._live) - self.running

    def plan(self) -> Plan:
        """Pages for the next block of those who run, slots for those who wait."""
        plan = Plan()
        for shard in self._shards:
            shard.pool.give_back(shard.copied)
            shard.copied = []
            for sequence in list(shard.running):
                if sequence.slot is not None:  # not preempted by one before it
                    self._extend(shard, sequence)
        while self._waiting and self._admit(self._waiting[0][2], plan):
            heapq.heappop(self._waiting)
        plan.running = [sequence for shard in self._shards for sequence in shard.running]
        return plan

    def _queue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (-sequence.request.priority, sequence.order, sequence))

    def _needed(self, sequence: Sequence) -> int:
        """Pages that hold all a sequence may have in the cache after the next block."""
        longest = len(sequence.request.prompt) - 1 + sequence.limit
        return -(-min(sequence.position + self._block, longest) // self._page)

    def _extend(self, shard: _Shard, sequence: Sequence) -> None:
        """Pages for the next block, if need be at the cost of sequences admitted later, or of itself."""
        more = self._needed(sequence) - len(sequence.pages)
        while not shard.prefixes.make_room(more):
            victim = shard.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return
        sequence.pages += shard.pool.take(max(0, more))

    def _preempt(self, sequence: Sequence) -> None:
        self.counts["preempted"] += 1
        self._vacate(sequence)
        sequence.tokens, sequence.logprobs, sequence.read = [], [], 0
        self._queue(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        shard = self._shards[sequence.slot // self._slots]
        shard.running.remove(sequence)
        shard.free_slots.append(sequence.slot)
        shard.pool.give_back(sequence.pages)
        sequence.slot, sequence.pages = None, []

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        """Give the first of the queue a slot, if there is one with enough pages; True also if it has ended."""
        if sequence.ended:
            return True
        prompt = sequence.request.prompt
        open_shards = [shard for shard in self._shards if shard.free_slots]
        # Where the prompt is known already it costs least; else where there is most room.
        open_shards.sort(key=lambda shard: (prompt not in shard.prefixes, -len(shard.free_slots), -shard.pool.free))
        return any(self._place(sequence, shard, plan) for shard in open_shards)

    def _place(self, sequence: Sequence, shard: _Shard, plan: Plan) -> bool:
        prompt = sequence.request.prompt
        cached = len(prompt) - 1  # the last token is fed by the decoder, which needs its output
        full, whole = cached // self._page, -(-cached // self._page)
        own = self._needed(sequence) - full
        known = prompt in shard.prefixes
        if known:
            shared = shard.pool.share(shard.prefixes.find(prompt))  # held, so that making room cannot take them
        else:
            shared = []
        # Whoever runs already will soon want a page; without that reserve the newcomer would be thrown out again.
        if not shard.prefixes.make_room(own + len(shard.running) + (0 if known else whole)):
            shard.pool.give_back(shared)
            return False
        if not known:
            pages = shard.pool.take(whole)
            shard.prefixes.add(prompt, pages)
            shared = shard.pool.share(pages)
            if cached:
                plan.prefills.append(Prefill(prompt, self._shards.index(shard), tuple(pages)))
        self.counts["shared" if known else "prefilled"] += 1
        taken = shard.pool.take(own)
        if whole > full:
            plan.copies.append((self._shards.index(shard), shared[full], taken[0]))
            shard.copied += shared[full:]
        sequence.pages = shared[:full] + taken
        sequence.slot = shard.free_slots.pop()
        shard.running.append(sequence)
        return True
