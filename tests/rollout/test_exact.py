"""A completion depends on its request and the weights alone, bit for bit: not on company, order, slot, pages, time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest

from azr_jax.config import MeshConfig, RolloutConfig
from azr_jax.learn.state import param_shardings
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key
from azr_jax.telemetry.process import CompileCounter
from tests.rollout.engines import EOS, LONG, MODEL, SHORT, assert_same, engine, finish, params_of, requests

TOKEN_BYTES = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 4  # of keys and values, float32


class Case(NamedTuple):
    """An engine, how few pages make it throw sequences out, and what to ask it."""

    config: RolloutConfig
    eos: frozenset[int]
    kind: str
    few_pages: int
    requests: tuple[Request, ...]

    @property
    def few_gb(self) -> float:
        return (self.few_pages + 0.5) * self.config.page * TOKEN_BYTES / 2**30

    def engine(self, **changes: object) -> Engine:
        return engine(replace(self.config, **changes), self.eos, kind=self.kind)


#: Responses of the long case: some grow over two chunks, some are done within a block.
LIMITS = (480, 5, 40, 300, 10, 280, 3, 90, 17, 33, 2, 260)

CASES = {
    "working": Case(SHORT, EOS, "working", 8, tuple(requests(40, longest=12))),
    "chunked": Case(
        LONG,
        frozenset(),
        "working",
        19,
        tuple(replace(r, max_tokens=n) for r, n in zip(requests(12, longest=24), LIMITS, strict=True)),
    ),
    "paged": Case(SHORT, EOS, "xla", 8, tuple(requests(40, longest=12))),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cache
def expected(case: Case) -> tuple[Completion, ...]:
    """All of them together, more than there are slots."""
    made = case.engine()
    done = tuple(made.generate(params_of(), case.requests))
    assert len(done) > made.config.slots and made.stats.shared > 0 and made.stats.preempted == 0
    return done


@each_case
def test_alone_in_an_empty_engine(case: Case) -> None:
    single = case.engine()
    for request, want in zip(case.requests, expected(case), strict=True):
        assert_same(single.generate(params_of(), [request]), [want])
        single._scheduler.forget_prefixes()
    assert single.stats.shared == 0


@each_case
def test_in_another_order(case: Case) -> None:
    order = np.random.default_rng(1).permutation(len(case.requests))
    shuffled = case.engine().generate(params_of(), [case.requests[i] for i in order])
    assert_same(shuffled, [expected(case)[i] for i in order])


@each_case
def test_with_other_priorities(case: Case) -> None:
    draws = np.random.default_rng(2).random(len(case.requests))
    ranked = [replace(r, priority=float(p)) for r, p in zip(case.requests, draws, strict=True)]
    assert_same(case.engine().generate(params_of(), ranked), expected(case))


@each_case
def test_in_another_slot(case: Case) -> None:
    last = case.config.slots - 1
    for slot, index in ((last, 0), (last // 2, 1), (1, len(case.requests) - 1)):
        busy = case.engine()
        busy.load(params_of())
        busy.submit(Request((9, i), request_key(1, i), id=f"filler {i}") for i in range(slot))
        busy.submit([case.requests[index]])
        busy.step()
        assert busy._live[index].slot == slot
        assert_same([finish(busy)[index]], [expected(case)[index]])


def test_thrown_out_and_replayed() -> None:
    """So few pages that sequences start over, and prompts are forgotten."""
    case = CASES["working"]
    scarce = case.engine(cache_gb=case.few_gb)
    assert_same(scarce.generate(params_of(), case.requests), expected(case))
    assert scarce._device.layout.pages == case.few_pages and scarce.stats.preempted > 0


@each_case
@pytest.mark.parametrize("seed", [0, 1])
def test_amid_requests_that_come_and_go(case: Case, seed: int) -> None:
    """Submitted a few at a time, between blocks, with strangers of any length, some of whom are cancelled."""
    rng = np.random.default_rng(seed)
    crowd = case.engine()
    crowd.load(params_of())
    todo, strangers = list(rng.permutation(len(case.requests))), 0
    done: dict[object, Completion] = {}
    while todo or crowd.busy:
        wanted = [case.requests[todo.pop()] for _ in range(min(len(todo), rng.integers(0, 4)))]
        for _ in range(rng.integers(0, 3) if todo else 0):
            prompt = tuple(map(int, rng.integers(0, 64, rng.integers(1, case.config.max_prompt + 1))))
            if wanted and rng.random() < 0.5:
                prompt = wanted[0].prompt
            limit = int(rng.integers(1, case.config.max_response + 1))
            priority = float(rng.choice([0.0, 1.0]))
            key = request_key(9, strangers)
            wanted.append(Request(prompt, key, id=("stranger", strangers), max_tokens=limit, priority=priority))
            strangers += 1
        crowd.submit(wanted[::-1])
        if crowd.busy:
            crowd.step()
        done |= crowd.poll()
        crowd.cancel([("stranger", int(i)) for i in rng.integers(0, max(1, strangers), 2)])
    assert strangers > 3
    assert_same([done[i] for i in range(len(case.requests))], expected(case))


@pytest.fixture(scope="module")
def restarted() -> Engine:
    """With programs of its own, and few pages."""
    case = CASES["chunked"]
    made = engine(replace(LONG, cache_gb=case.few_gb), case.eos, compiled=False)
    made.load(params_of())
    made.warm_up()
    return made


def test_after_a_restart(restarted: Engine) -> None:
    """And with so few pages that sequences start over in the middle of their second chunk."""
    case = CASES["chunked"]
    assert_same(restarted.generate(params_of(), case.requests), expected(case))
    assert restarted._device.layout.pages == case.few_pages and restarted.stats.preempted > 3


def test_nothing_is_compiled_after_the_warm_up(restarted: Engine) -> None:
    """Fifty rounds of mixed lengths: all widths of table, full and empty slots, shared prompts, changed weights."""
    counter = CompileCounter()
    widths = set()
    decode = restarted._device.decode
    restarted._device.decode = lambda slots, *rest: widths.add(slots.table.shape[1]) or decode(slots, *rest)
    rng = np.random.default_rng(3)
    weights = params_of(), jax.tree.map(lambda x: x + 0, params_of())
    compiled_for_the_test = counter.programs
    for i in range(50):
        limits = rng.integers(1, 40, rng.integers(1, 9))
        if i % 10 == 0:
            limits[0] = (30, 270, 470)[i // 10 % 3]
        prompts = [tuple(map(int, rng.integers(0, 64, rng.integers(1, 25)))) for _ in limits]
        prompts[-1] = prompts[0]
        some = [Request(p, request_key(i, n), max_tokens=int(n)) for p, n in zip(prompts, limits, strict=True)]
        restarted.generate(weights[i // 10 % 2], some)
    assert widths == set(restarted._device.widths) and len(widths) == 2
    assert counter.programs == compiled_for_the_test


def test_in_other_shapes() -> None:
    """Slots that are no power of two, other blocks, pages and limits: to rounding, sums are in another order."""
    case = CASES["working"]
    other = case.engine(slots=6, block=7, max_prompt=24, max_response=31, page=16)
    for got, want in zip(other.generate(params_of(), case.requests), expected(case), strict=True):
        n = len(want.tokens)
        np.testing.assert_array_equal(got.tokens[:n], want.tokens)
        np.testing.assert_allclose(got.logprobs[:n], want.logprobs, atol=1e-5)
        assert (len(got.tokens) > n) == (want.finish == "length")


def test_pages_read_in_place() -> None:
    assert_same(expected(CASES["paged"]), expected(CASES["working"]), atol=1e-5)


def test_on_many_devices() -> None:
    """Weights as the learner has them; the engine makes a mesh of its own, whose shards share nothing."""
    case = CASES["working"]
    many = engine(SHORT, EOS, MeshConfig(1, 8, 1))
    assert many._device.mesh.devices.shape == (4, 1, 2)
    params = jax.device_put(params_of(), param_shardings(MODEL, many.mesh))
    assert_same(many.generate(params, case.requests), expected(case), atol=1e-5)
    assert 0 < many.stats.shared < len(case.requests)


def test_weights_and_companions_of_other_weights() -> None:
    """What was prefilled with other weights is not used, and one set of weights does not wear off on the next."""
    case = CASES["working"]
    other = engine(SHORT, EOS).generate(params_of(6), case.requests)
    assert any(len(a.tokens) != len(b.tokens) for a, b in zip(other, expected(case), strict=True))
    busy = case.engine()
    for _ in range(2):
        assert_same(busy.generate(params_of(), case.requests), expected(case))
        assert_same(busy.generate(params_of(6), case.requests), other)
