"""Slots and pages: after any sequence of events the books balance, and everything that waits is finished one day."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azr_jax.rollout.pages import PagePool, Prefixes
from azr_jax.rollout.request import Request
from azr_jax.rollout.scheduler import Plan, Scheduler, Sequence

PAGE, BLOCK, SLOTS = 4, 3, 3
LONGEST_PROMPT, LONGEST_RESPONSE = 9, 12
LEAST = Scheduler.pages_for(LONGEST_PROMPT - 1 + LONGEST_RESPONSE, PAGE)


def test_pages_come_and_go() -> None:
    pool = PagePool(5)
    assert pool.free == 4
    pages = pool.take(3)
    assert len(set(pages)) == 3 and set(pages) <= {1, 2, 3, 4} and pool.free == 1
    assert pool.share(pages[:2]) == pages[:2]
    pool.give_back(pages)
    assert pool.free == 2, "two of them are held by somebody else"
    pool.give_back(pages[:2])
    assert pool.free == 4 and sorted(pool.take(4)) == [1, 2, 3, 4]


def test_pages_that_are_not_there() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="4 pages wanted, 3 free"):
        pool.take(4)
    assert pool.free == 3, "nothing was taken"
    (page,) = pool.take(1)
    pool.give_back([page])
    with pytest.raises(ValueError, match=f"page {page} given back twice"):
        pool.give_back([page])
    with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
        pool.share([page])
    with pytest.raises(ValueError, match="page 0"):
        pool.give_back([0])


def test_prompts_are_forgotten_in_the_order_of_their_last_use() -> None:
    pool = PagePool(7)
    prefixes = Prefixes(pool)
    pages = {prompt: pool.take(2) for prompt in ((1,), (2,), (3,))}
    for prompt, own in pages.items():
        prefixes.add(prompt, own)
    assert prefixes.find((1,)) == pages[1,]
    assert prefixes.make_room(1) and pool.free == 2
    assert (2,) not in prefixes and (1,) in prefixes and (3,) in prefixes
    held = pool.share(pages[3,])
    assert not prefixes.make_room(5) and pool.free == 2, "nothing is forgotten in vain"
    assert prefixes.make_room(4) and (1,) not in prefixes and (3,) in prefixes
    pool.give_back(held)
    assert prefixes.make_room(6) and not prefixes.make_room(7)
    with pytest.raises(KeyError):
        prefixes.find((1,))
    prefixes.add((4,), pool.take(3))
    prefixes.clear()
    assert pool.free == 6


def test_a_prompt_is_prefilled_once() -> None:
    scheduler = Scheduler(4, 20, PAGE, BLOCK)
    prompt = tuple(range(7))  # six tokens in the cache: one full page and a partial one
    first, second = (scheduler.submit(Request(prompt, (0, i)), 4) for i in range(2))
    other = scheduler.submit(Request((5,), (0, 3)), 4)
    plan = scheduler.plan()
    assert plan.running == [first, second, other]
    ((shared, partial),) = (prefill.pages for prefill in plan.prefills)
    assert first.pages[0] == second.pages[0] == shared
    assert plan.copies == [(0, partial, first.pages[1]), (0, partial, second.pages[1])]
    assert len({shared, partial, *first.pages, *second.pages, *other.pages}) == 7
    assert scheduler.counts == {"prefilled": 2, "shared": 1}  # a prompt of one token costs nothing
    scheduler.end(first)
    third = scheduler.submit(Request(prompt, (0, 4)), 4)
    again = scheduler.plan()
    assert again.running[-1] is third and not again.prefills and third.pages[0] == shared
    assert again.copies == [(0, partial, third.pages[1])]
    for sequence in (second, third, other):
        scheduler.end(sequence)
    scheduler.forget_prefixes()
    scheduler.submit(Request(prompt, (0, 5)), 4)
    assert len(scheduler.plan().prefills) == 1


def test_a_prompt_known_in_one_shard_goes_there() -> None:
    scheduler = Scheduler(2, 20, PAGE, BLOCK, shards=2)
    prompts = [(1, 2, 3), (4, 5, 6), (1, 2, 3), (4, 5, 6)]
    sequences = [scheduler.submit(Request(prompt, (0, i)), 4) for i, prompt in enumerate(prompts)]
    plan = scheduler.plan()
    shards = [sequence.slot // 2 for sequence in sequences]
    assert shards[0] == shards[2] != shards[1] == shards[3]
    assert sorted(prefill.shard for prefill in plan.prefills) == [0, 1]
    assert {copy[0] for copy in plan.copies} == {0, 1}


def test_the_last_one_admitted_makes_room() -> None:
    scheduler = Scheduler(SLOTS, LEAST + 1, PAGE, BLOCK)
    sequences = [scheduler.submit(Request((i,), (0, i)), LONGEST_RESPONSE) for i in range(3)]
    order: list[list[int]] = []
    while scheduler.running or scheduler.waiting:
        running = scheduler.plan().running
        order.append([sequence.order for sequence in running])
        for sequence in running:
            sequence.tokens += [7] * BLOCK
            if len(sequence.tokens) == LONGEST_RESPONSE:
                scheduler.end(sequence)
    assert order[0] == [0, 1, 2] and scheduler.counts["preempted"] > 0
    assert [sequence.ended for sequence in sequences] == [True] * 3
    first_without = {i: next(n for n, running in enumerate(order) if i not in running) for i in range(3)}
    assert first_without[2] < first_without[1] <= first_without[0]
    assert first_without[0] == LONGEST_RESPONSE // BLOCK, "the first one is never thrown out"


def test_misuse() -> None:
    scheduler = Scheduler(SLOTS, LEAST, PAGE, BLOCK)
    sequence = scheduler.submit(Request((1, 2), (0, 0)), 3)
    scheduler.plan()
    with pytest.raises(ValueError, match="weights cannot change while sequences run"):
        scheduler.forget_prefixes()
    scheduler.end(sequence)
    with pytest.raises(ValueError, match="sequence 0 ended twice"):
        scheduler.end(sequence)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=LONGEST_PROMPT).map(tuple)


class Books(RuleBasedStateMachine):
    """Everything the engine does with a scheduler, in any order; who holds what is counted from outside."""

    @initialize(shards=st.integers(1, 3), spare=st.integers(0, 5))
    def start(self, shards: int, spare: int) -> None:
        self.pages, self.shards = LEAST + spare, shards
        self.scheduler = Scheduler(SLOTS, self.pages, PAGE, BLOCK, shards)
        self.live: list[Sequence] = []
        self.decoding: list[Sequence] = []  # in the block on the device
        self.finished = 0
        self.prompts: list[tuple[int, ...]] = []

    @rule(
        prompt=prompts,
        again=st.booleans(),
        limit=st.sampled_from([1, 4, LONGEST_RESPONSE - 1, LONGEST_RESPONSE]),
        priority=st.sampled_from([0.0, 1.0, 5.0]),
        count=st.integers(1, 4),
    )
    def submit(self, prompt: tuple[int, ...], again: bool, limit: int, priority: float, count: int) -> None:
        if again and self.prompts:
            prompt = self.prompts[sum(prompt) % len(self.prompts)]
        self.prompts.append(prompt)
        for _ in range(count):
            request = Request(prompt, (0, 0), priority=priority)
            self.live.append(self.scheduler.submit(request, limit))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """One that waits or runs, or that is being decoded right now."""
        sequence = data.draw(st.sampled_from(self.live), "cancelled")
        self.live.remove(sequence)
        self.scheduler.end(sequence)

    @rule(early=st.lists(st.booleans(), min_size=9, max_size=9), gained=st.integers(1, BLOCK))
    def step(self, early: list[bool], gained: int) -> None:
        """A block lands, some sequences end, the next one is planned."""
        for sequence, ends in zip(self.decoding, early, strict=False):
            if sequence.ended:
                continue
            sequence.tokens += [1] * min(gained, sequence.limit - len(sequence.tokens))
            if ends or len(sequence.tokens) == sequence.limit:
                self.live.remove(sequence)
                self.scheduler.end(sequence)
        ran = [sequence for sequence in self.live if sequence.slot is not None]
        preempted = self.scheduler.counts["preempted"]
        plan = self.scheduler.plan()
        thrown_out = [sequence for sequence in ran if not sequence.tokens]
        assert len(thrown_out) == self.scheduler.counts["preempted"] - preempted
        self.check_plan(plan, [sequence for sequence in ran if sequence not in thrown_out])
        self.decoding = plan.running

    def check_plan(self, plan: Plan, kept: list[Sequence]) -> None:
        running = plan.running
        assert len(running) == self.scheduler.running and set(running) <= set(self.live)
        assert bool(running) == bool(self.live), "while there is something to do, something is done"
        assert set(kept) <= set(running)
        for sequence in running:
            assert len(sequence.pages) * PAGE >= min(
                sequence.position + BLOCK, len(sequence.request.prompt) - 1 + sequence.limit
            ), "the next block has room"
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(SLOTS * self.shards))
        waiting = [sequence for sequence in self.live if sequence.slot is None]
        new = [sequence for sequence in running if sequence not in kept]
        assert all(not sequence.tokens for sequence in new + waiting)
        assert not new or not waiting or max(map(rank, new)) < min(map(rank, waiting)), "highest priority first"
        # What is computed or copied goes where nobody else reads.
        written = [(prefill.shard, page) for prefill in plan.prefills for page in prefill.pages]
        written += [(shard, target) for shard, _, target in plan.copies]
        assert len(set(written)) == len(written) and all(page for _, page in written)
        old = {(shard_of(s), page) for s in kept for page in s.pages}
        for shard, source, target in plan.copies:
            assert source and (shard, target) not in old, "a sequence that ran already was overwritten"
            assert [target in s.pages for s in new if shard_of(s) == shard].count(True) == 1
        for prefill in plan.prefills:
            assert len(prefill.pages) == -(-(len(prefill.prompt) - 1) // PAGE)
            assert not {(prefill.shard, page) for page in prefill.pages} & old

    @precondition(lambda self: self.scheduler.running == 0)
    @rule()
    def change_weights(self) -> None:
        self.scheduler.forget_prefixes()

    @rule()
    def drain(self) -> None:
        """Whatever is left, is finished: nobody waits for ever, nobody is thrown out again and again."""
        plans = 0
        while self.live:
            self.step([False] * 9, BLOCK)
            plans += 1
            assert plans < 2000
        self.scheduler.plan()
        self.scheduler.forget_prefixes()
        for shard in self.scheduler._shards:
            assert shard.pool.free == self.pages - 1 and len(shard.free_slots) == SLOTS
        assert self.scheduler.running == self.scheduler.waiting == 0 == len(self.scheduler._waiting)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = [Counter() for _ in range(self.shards)]
        private: list[tuple[int, int]] = []
        for sequence in self.live:
            assert (sequence.slot is None) <= (sequence.pages == [])
            if sequence.slot is None:
                continue
            held[shard_of(sequence)].update(sequence.pages)
            full = (len(sequence.request.prompt) - 1) // PAGE
            private += [(shard_of(sequence), page) for page in sequence.pages[full:]]
        assert len(set(private)) == len(private), "a page is written by two sequences"
        for index, shard in enumerate(self.scheduler._shards):
            for pages in shard.prefixes._pages.values():
                held[index].update(pages)
                assert not {(index, page) for page in pages} & set(private)
            held[index].update(shard.copied)
            counts = [held[index][page] for page in range(self.pages)]
            assert counts == shard.pool.holders and counts[0] == 0
            free = shard.pool._free
            assert len(set(free)) == len(free) and {p for p in range(1, self.pages) if not counts[p]} == set(free)
            taken = [s.slot for s in self.live if s.slot is not None and shard_of(s) == index]
            assert sorted([*taken, *shard.free_slots]) == list(range(index * SLOTS, (index + 1) * SLOTS))
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)


def rank(sequence: Sequence) -> tuple[float, int]:
    """Who comes first: by priority, then by age."""
    return -sequence.request.priority, sequence.order


def shard_of(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot // SLOTS


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=120, stateful_step_count=50)
