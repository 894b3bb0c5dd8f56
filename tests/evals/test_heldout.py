"""Held-out sets: fixed, distinct, out of pretraining; evaluation is paired and judged by the executor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from azr_jax.config import ExecutorConfig
from azr_jax.evals.heldout import SPLITS, evaluate, held_out_tasks
from azr_jax.evals.schedule import FRESH_SEED, FixedEvaluation, fresh_comparison
from azr_jax.executor import ExecutorPool
from azr_jax.micro.language import is_held_out
from azr_jax.models.tokenizer import load_tokenizer
from azr_jax.models.weights import EMBEDDED
from azr_jax.rollout.request import Completion, Request
from azr_jax.tasks.compact import CompactFormat
from azr_jax.tasks.kinds import KINDS, Kind, Task
from azr_jax.telemetry.metrics import unknown_names
from azr_jax.telemetry.progress import before_after_table


class Oracle:
    """Stands in for the sampler: answers the tasks it knows correctly, every other one with nonsense."""

    def __init__(self, known: Sequence[Task], thinks: bool = False) -> None:
        self.tokenizer = load_tokenizer(EMBEDDED)
        self.thinks = thinks
        self.longest = 1000
        gold = {Kind.DEDUCTION: "output", Kind.ABDUCTION: "input", Kind.INDUCTION: "program"}
        self.answers = {CompactFormat().solve(task): getattr(task, gold[task.kind]) for task in known}

    def fits(self, prompt: Sequence[int]) -> bool:
        return len(prompt) <= self.longest

    def text(self, completion: Completion) -> str:
        return self.tokenizer.decode(completion.tokens)

    def generate(self, params: object, requests: Sequence[Request]) -> list[Completion]:
        assert all(map(self.fits, (request.prompt for request in requests)))
        texts = [self.answers.get(self.tokenizer.decode(request.prompt), "nonsense") for request in requests]
        think = "<think>1" if self.thinks else ""
        ids = [np.array([*self.tokenizer.encode(f"{think}<ans>{text}"), 2], np.int32) for text in texts]
        return [Completion(tokens, np.zeros(len(tokens), np.float32), "eos") for tokens in ids]


def outcome(oracle: Oracle, pool: ExecutorPool, tasks: Sequence[Task]):  # noqa: ANN201
    return evaluate(oracle, {}, pool, CompactFormat(), tasks, 0.0, seed=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool():  # noqa: ANN201
    with ExecutorPool(ExecutorConfig(workers=1)) as pool:
        yield pool


@pytest.mark.parametrize("split", SPLITS)
def test_sets_are_fixed_distinct_and_held_out(split: str) -> None:
    tasks = held_out_tasks(split, 60, seed=4)
    assert tasks == held_out_tasks(split, 60, seed=4)
    assert tasks != held_out_tasks(split, 60, seed=5)
    kinds = KINDS if split == "standard" else KINDS[:2]
    for kind in kinds:
        programs = [task.program for task in tasks if task.kind is kind]
        assert len(programs) == len(set(programs)) == 60
        assert all(is_held_out(program) for program in programs)
    if split == "longer":
        assert {task.program.count("\n") for task in tasks} == {5, 6}


def test_every_gold_answer_is_right_and_nonsense_is_wrong(pool: ExecutorPool) -> None:
    tasks = [task for split in SPLITS for task in held_out_tasks(split, 20, seed=1)]
    right, wrong = outcome(Oracle(tasks), pool, tasks), outcome(Oracle([]), pool, tasks)
    assert all(right.correct) and not any(wrong.correct)
    assert right.accuracy().value == 1.0 and right.accuracy(Kind.INDUCTION).n == 20


def test_a_prompt_that_does_not_fit_is_a_wrong_answer_and_no_error(pool: ExecutorPool) -> None:
    tasks = held_out_tasks("standard", 10, seed=1)
    oracle = Oracle(tasks)
    sizes = [len(oracle.tokenizer.encode(CompactFormat().solve(task))) for task in tasks]
    oracle.longest = sorted(sizes)[15]
    found = outcome(oracle, pool, tasks)
    assert list(found.correct) == [size <= oracle.longest for size in sizes]
    assert [length > 0 for length in found.lengths] == list(found.correct)


def test_a_baseline_of_other_sets_is_not_taken() -> None:
    evaluation = FixedEvaluation(per_kind=4)
    names = [f"{split}/{mode}" for split in SPLITS for mode in ("sampled", "greedy")]
    right = {name: [False] * len(evaluation.tasks[name.split("/")[0]]) for name in names}
    assert evaluation.take_baseline(right) and evaluation.baseline == right
    assert not evaluation.take_baseline({}) and evaluation.baseline == {}
    assert not evaluation.take_baseline(right | {"longer/greedy": [True] * 5})


def test_gain_is_paired_to_the_first_measurement(pool: ExecutorPool) -> None:
    evaluation = FixedEvaluation(per_kind=10)
    standard = evaluation.tasks["standard"]
    half = [task for kind in KINDS for task in [t for t in standard if t.kind is kind][:5]]
    everything = [task for tasks in evaluation.tasks.values() for task in tasks]
    first = evaluation.measure(lambda tasks, temperature: outcome(Oracle(half), pool, tasks))
    second = evaluation.measure(lambda tasks, temperature: outcome(Oracle(everything, True), pool, tasks))
    assert unknown_names(first) == unknown_names(second) == []
    assert first["eval/greedy/pooled"] == 0.5 and first["eval/gain/greedy/pooled"] == 0.0
    assert second["eval/gain/sampled/deduction"] == 0.5 and second["eval/gain/sampled/pooled_low"] > 0.2
    assert second["eval/gain/greedy/longer"] == second["eval/gain/sampled/bigger"] == 1.0
    assert first["eval/think_share/sampled"] == 0.0 and second["eval/think_share/sampled"] == 1.0


def test_fresh_comparison_covers_every_set(pool: ExecutorPool) -> None:
    class Everything(Oracle):
        def generate(self, params: object, requests: Sequence[Request]) -> list[Completion]:
            sizes = {"standard": 6, "longer": 3, "bigger": 3}
            tasks = [task for split in SPLITS for task in held_out_tasks(split, sizes[split], FRESH_SEED + 3)]
            self.answers = Oracle(tasks).answers
            return super().generate(params, requests)

    lines = fresh_comparison(
        lambda tasks, temperature: outcome(Oracle([]), pool, tasks),
        lambda tasks, temperature: outcome(Everything([]), pool, tasks),
        per_kind=6,
        seed=3,
    )
    assert {(line.mode, line.set) for line in lines} == {
        (mode, name)
        for mode in ("sampled", "greedy")
        for name in ("deduction", "abduction", "induction", "pooled", "longer", "bigger")
    }
    assert all(line.difference == 1.0 and line.before == 0.0 for line in lines)
    assert "all kinds" in before_after_table(lines)
