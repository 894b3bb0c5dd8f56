"""Held-out micro programs: tasks whose programs are in no pretraining text, by canonical AST.

Three splits: `standard` (the pretraining distribution of sizes and values, all kinds), `longer` (5 and 6 statements)
and `bigger` (larger numbers, longer lists and strings), the last two for deduction and abduction. A set is a pure
function of (split, size, seed). Measures the embedded model and models tuned on its prompt format, nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from azr_jax.dist.hosts import Hosts
from azr_jax.evals.intervals import Estimate, paired_difference, share
from azr_jax.executor import ExecutorPool
from azr_jax.micro.corpus import LENGTHS, induction_task
from azr_jax.micro.language import BIGGER, NORMAL, sample_runnable
from azr_jax.models.transformer import Params
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Request, request_key
from azr_jax.round import answer_check
from azr_jax.tasks.kinds import KINDS, Kind, Task
from azr_jax.tasks.prompts import PromptFormat

log = logging.getLogger(__name__)

SPLITS = ("standard", "longer", "bigger")
LONGER_LENGTHS = {5: 0.5, 6: 0.5}


def held_out_tasks(split: str, per_kind: int, seed: int) -> list[Task]:
    """per_kind tasks of each kind of the split, all programs of a kind different, the same for the same arguments."""
    lengths = LONGER_LENGTHS if split == "longer" else LENGTHS
    limits = BIGGER if split == "bigger" else NORMAL
    tasks: list[Task] = []
    for kind in KINDS if split == "standard" else KINDS[:2]:
        rng = Random(f"{split}/{kind.value}/{seed}")
        programs: set[str] = set()
        while len(programs) < per_kind:
            if kind is Kind.INDUCTION:
                task = induction_task(rng, held_out=True)[0]
            else:
                program, value, states = sample_runnable(lengths, rng, held_out=True, limits=limits)
                task = Task(kind, program.source, repr(value), repr(states[-1]))
            if task.program not in programs:
                programs.add(task.program)
                tasks.append(task)
    return tasks


@dataclass(frozen=True)
class Outcome:
    """What the policy did on a list of tasks; the lists run parallel to `tasks`."""

    tasks: tuple[Task, ...]
    correct: tuple[bool, ...]
    thinks: tuple[bool, ...]
    lengths: tuple[int, ...]

    def of(self, kind: Kind | None, values: Sequence) -> list:
        """The entries of one kind, or all for None."""
        return [value for task, value in zip(self.tasks, values, strict=True) if kind in (None, task.kind)]

    def accuracy(self, kind: Kind | None = None) -> Estimate:
        """pass@1 with its interval, of one kind or pooled."""
        return share(self.of(kind, self.correct))

    def gain_over(self, before: Outcome, kind: Kind | None = None) -> Estimate:
        """Paired difference to an earlier outcome on the same tasks."""
        return paired_difference(before.of(kind, before.correct), self.of(kind, self.correct))

    def think_share(self, kind: Kind | None = None) -> float:
        """Share of responses that reason before answering."""
        values = self.of(kind, self.thinks)
        return sum(values) / max(1, len(values))

    def mean_length(self, kind: Kind | None = None) -> float:
        """Mean response length in tokens."""
        values = self.of(kind, self.lengths)
        return sum(values) / max(1, len(values))


def evaluate(
    engine: Engine,
    params: Params,
    pool: ExecutorPool,
    prompts: PromptFormat,
    tasks: Sequence[Task],
    temperature: float,
    seed: int,
    hosts: Hosts | None = None,
) -> Outcome:
    """One response per task (temperature 0: greedy), judged by the executor; each of `hosts` does its share of them.

    An answer it could not judge is wrong, and so is a task whose prompt is longer than the engine takes.
    """
    hosts = hosts or Hosts()
    encoded = {i: engine.tokenizer.prompt(prompts.solve(task)) for i, task in enumerate(tasks)}
    asked = [i for i, ids in encoded.items() if engine.fits(ids)]
    if len(asked) < len(tasks):
        log.warning("evaluation: %d of %d prompts exceed rollout.max_prompt", len(tasks) - len(asked), len(tasks))
    mine = [i for i in asked if hosts.owns(i)]
    requests = [Request(encoded[i], request_key(seed, "eval", i), temperature) for i in mine]
    completions = dict(zip(mine, engine.generate(params, requests), strict=True))
    responses = {i: engine.text(completion) for i, completion in completions.items()}
    answers = {i: prompts.parse_answer(tasks[i].kind, response) for i, response in responses.items()}
    checks = [answer_check(str(i), tasks[i], answer) for i, answer in answers.items() if answer is not None]
    correct = {int(verdict.id): verdict.correct for verdict in pool.run_all(checks)}
    told = [[i, correct.get(i, False), prompts.thinks(responses[i]), len(completions[i].tokens)] for i in mine]
    heard = hosts.gather("evaluation", json.dumps(told).encode())
    assert heard is not None  # nobody gave None
    found = {row[0]: row[1:] for data in heard for row in json.loads(data)}
    rows = [found.get(i, [False, False, 0]) for i in range(len(tasks))]
    return Outcome(tuple(tasks), *(tuple(column) for column in zip(*rows, strict=True)))
