"""Buffers: invariants under random operations, exact JSON, and what each preset keeps, drops and refuses."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.config import PRESETS
from azr_jax.tasks.buffers import TaskBuffers, seed_task
from azr_jax.tasks.canonical import task_key
from azr_jax.tasks.kinds import KINDS, Kind, Task
from azr_jax.tasks.validation import static_rejection


def make(number: int, step: int = 0, kind: Kind = Kind.DEDUCTION, name: str = "a") -> Task:
    """A task that differs from others by one constant."""
    program = f"def f({name}):\n    return {name} + {number}"
    if kind is Kind.INDUCTION:
        return Task(kind, program, pairs=(("1", str(1 + number)), ("2", str(2 + number))), message="m", step=step)
    return Task(kind, program, input="1", output=str(1 + number), step=step)


def numbers(tasks: list[Task] | tuple[Task, ...]) -> list[int]:
    return [int(task.program.rsplit(" ", 1)[1]) for task in tasks]


def reload(buffers: TaskBuffers, preset: str) -> TaskBuffers:
    return TaskBuffers.from_json(json.loads(json.dumps(buffers.to_json())), PRESETS[preset])


@pytest.mark.parametrize("kind", KINDS)
def test_seed_task_is_the_identity_on_hello_world(kind: Kind) -> None:
    task = seed_task(kind)
    assert static_rejection(task.program) is None
    assert task.key == task_key(task)
    assert (task.pairs or ((task.input, task.output),)) == (("'Hello World'", "'Hello World'"),)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 12), st.sampled_from("ab")), min_size=1, max_size=60
)


@settings(max_examples=150)
@given(OPERATIONS, st.integers(1, 8), st.sampled_from(sorted(PRESETS)), st.integers(0, 2**32))
def test_invariants_under_random_operations(
    operations: list[tuple[Kind, int, str]], cap: int, preset: str, seed: int
) -> None:
    rules = PRESETS[preset]
    buffers = TaskBuffers(cap, rules)
    model: dict[Kind, list[Task]] = {kind: [] for kind in KINDS}  # a list-based model of what must be stored
    seen: dict[Kind, set[str]] = {kind: {seed_task(kind).key} for kind in KINDS}
    for turn, (kind, number, name) in enumerate(operations):
        task = make(number, turn // 5, kind, name)
        key = task_key(task)
        refused = rules.duplicates == "reject" and key in seen[kind]
        assert buffers.is_duplicate(task) == refused
        stored = buffers.add(task)
        seen[kind].add(key)
        full = len(model[kind]) == cap
        assert stored == (not refused and not (full and rules.overflow == "drop_newest"))
        if stored:
            model[kind] = [*model[kind], task][-cap:]
        if turn % 7 == 0:
            buffers = reload(buffers, preset)  # a resume in the middle changes nothing
        for each in KINDS:
            assert [(t.program, t.step) for t in buffers.tasks(each)] == [(t.program, t.step) for t in model[each]]
            assert all(t.key for t in buffers.tasks(each))
            if rules.duplicates == "reject":
                assert len({t.key for t in buffers.tasks(each)}) == buffers.size(each)

    step = (len(operations) - 1) // 5
    copy = reload(buffers, preset)
    assert copy.to_json() == buffers.to_json()
    for kind in KINDS:
        for size in (0, 1, cap, 3 * cap):
            batch = buffers.solver_batch(kind, size, step, Random(seed))
            assert batch == copy.solver_batch(kind, size, step, Random(seed))
            assert len(batch) == (size if buffers.size(kind) else 0)
            assert {t.key for t in batch} <= {t.key for t in buffers.tasks(kind)}
            references = buffers.references(kind, size, Random(seed))
            assert references == copy.references(kind, size, Random(seed))
            if kind is not Kind.INDUCTION:
                assert len(references) == min(size, max(1, buffers.size(kind)))
    assert set(buffers.metrics(step)) == set(copy.metrics(step))


def test_a_duplicate_stays_one_after_the_cap_dropped_it() -> None:
    buffers = TaskBuffers(2, PRESETS["fixed"])
    assert all(buffers.add(make(number)) for number in (1, 2, 3))
    assert numbers(buffers.tasks(Kind.DEDUCTION)) == [2, 3]
    assert buffers.is_duplicate(make(1, name="renamed"))
    assert not buffers.add(make(1, name="renamed"))
    assert not reload(buffers, "fixed").add(make(1))
    assert buffers.add(make(1, kind=Kind.ABDUCTION))  # each kind has its own memory


def test_the_seed_program_is_never_new_where_duplicates_are_refused() -> None:
    identity = Task(Kind.DEDUCTION, "def f(x):\n    return x", input="7", output="7")
    assert not TaskBuffers(4, PRESETS["fixed"]).add(identity)
    assert TaskBuffers(4, PRESETS["paper"]).add(identity)


def test_references() -> None:
    buffers = TaskBuffers(100, PRESETS["fixed"])
    rng = Random(0)
    assert buffers.references(Kind.DEDUCTION, 6, rng) == [seed_task(Kind.DEDUCTION)]
    assert buffers.references(Kind.INDUCTION, 6, rng)[0].program == seed_task(Kind.DEDUCTION).program
    assert buffers.references(Kind.DEDUCTION, 0, rng) == []
    for number in range(10):
        buffers.add(make(number + 1))
        buffers.add(make(number + 101, kind=Kind.ABDUCTION))
        buffers.add(make(number + 201, kind=Kind.INDUCTION))
    six = buffers.references(Kind.DEDUCTION, 6, rng)
    assert len(set(numbers(six))) == 6 and max(numbers(six)) <= 10
    given_programs = {numbers(buffers.references(Kind.INDUCTION, 6, rng))[0] for _ in range(400)}
    assert given_programs == {*range(1, 11), *range(101, 111)}  # the union of the other two buffers


def test_solver_batch_takes_the_new_first_and_tops_up_from_history() -> None:
    buffers = TaskBuffers(100, PRESETS["fixed"])
    for number in range(1, 21):
        buffers.add(make(number, step=number // 5))
    batch = numbers(buffers.solver_batch(Kind.DEDUCTION, 8, 3, Random(1)))
    assert batch[:5] == [15, 16, 17, 18, 19]
    assert len(set(batch)) == 8
    assert numbers(buffers.solver_batch(Kind.DEDUCTION, 3, 3, Random(1))) == [17, 18, 19]
    everything = numbers(buffers.solver_batch(Kind.DEDUCTION, 30, 3, Random(1)))
    assert len(everything) == 30 and set(everything) == set(range(1, 21))
    assert buffers.solver_batch(Kind.ABDUCTION, 8, 3, Random(1)) == []


def test_the_released_overflow_freezes_the_tail_and_the_fixed_one_does_not() -> None:
    released, fixed = TaskBuffers(10, PRESETS["reference"]), TaskBuffers(10, PRESETS["fixed"])
    batches: dict[str, list[list[int]]] = {"released": [], "fixed": []}
    for step in range(6):
        for number in range(4):
            for buffers in (released, fixed):
                buffers.add(make(1 + 4 * step + number, step=step))
        released = reload(released, "reference")
        batches["released"].append(sorted(numbers(released.solver_batch(Kind.DEDUCTION, 4, step, Random(step)))))
        batches["fixed"].append(sorted(numbers(fixed.solver_batch(Kind.DEDUCTION, 4, step, Random(step)))))
    assert batches["fixed"] == [[4 * step + k for k in (1, 2, 3, 4)] for step in range(6)]
    # Full in step 2, after two of its four tasks; from then on the same four pass for new.
    assert batches["released"] == [[1, 2, 3, 4], [5, 6, 7, 8], *[[7, 8, 9, 10]] * 4]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_metrics(preset: str) -> None:
    buffers = TaskBuffers(10, PRESETS[preset])
    for number in range(1, 13):
        buffers.add(make(number, step=number // 5))
    row = reload(buffers, preset).metrics(2)
    assert row["buffer/size/deduction"] == 10 and row["buffer/size/induction"] == 0
    assert row["buffer/dropped/deduction"] == 2  # numbers 11 and 12, or 1 and 2 in their stead
    assert row["buffer/new/deduction"] == (1 if preset == "reference" else 3)
    assert reload(buffers, preset).metrics(1)["buffer/dropped/deduction"] == 0
