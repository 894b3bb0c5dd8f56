"""The algorithm: propose, validate, estimate learnability, solve, reward. Read beside Algorithm 1 of arXiv 2505.03335.

One step is a pure function of (weights, buffers, seed, step): random choices come from generators made from the seed
and the step, samples from keys made of what they are. So a resumed run repeats itself exactly. The step ends with
trajectories and rewards; the policy-gradient update is `azr_jax.learn`, the run around it `azr_jax.train`.

Not here: text (tasks/), running programs (executor/), sampling (rollout/).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from azr_jax.config import PRESETS, Config
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool
from azr_jax.executor import Request as Check
from azr_jax.learn.packing import Trajectory
from azr_jax.models.transformer import Params
from azr_jax.rollout.engine import Engine
from azr_jax.rollout.request import Completion, Request, request_key
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.tasks.kinds import KINDS, Kind, Proposal, Role, Task, group_index
from azr_jax.tasks.prompts import PromptFormat
from azr_jax.tasks.rewards import Outcome, proposer_reward, solver_reward
from azr_jax.tasks.validation import distinct_inputs, proposal_rejection, task_key

SEED_ROUNDS = 60  # of one batch per kind, before a model that proposes nothing valid is given up
CONSTANT_LEARNABILITY = 0.5  # reward of every valid new task under that control


@dataclass
class Attempt:
    """One response of the policy and what became of it.

    A proposal has `outcome`, `reason`, `task` (if valid) and `solve_rate`; a solution has `task` and `correct`.
    `scored` is False where judging failed through our own fault: such a response is never trained on.
    """

    role: Role
    kind: Kind
    identity: tuple[int | str, ...]
    prompt: tuple[int, ...]
    references: Sequence[Task] = ()
    task: Task | None = None
    completion: Completion | None = None
    response: str = ""
    proposal: Proposal | None = None
    outcome: Outcome = Outcome.BAD_FORMAT
    reason: str = ""
    solve_rate: float | None = None
    answer: str | None = None
    correct: bool = False
    scored: bool = True
    reward: float = 0.0

    def trajectory(self, task: int) -> Trajectory:
        """For the learner: ids and log-probabilities exactly as sampled. `task`: number of the task it answers."""
        assert self.completion is not None
        return Trajectory(
            prompt=np.asarray(self.prompt, np.int32),
            response=self.completion.tokens,
            logprobs=self.completion.logprobs,
            reward=self.reward,
            group=group_index(self.role, self.kind),
            task=task,
            truncated=self.completion.finish == "length",
        )


@dataclass
class Step:
    """What one step produced. `estimates` are the learnability samples, `seconds` the time of each phase."""

    number: int
    proposals: list[Attempt]
    estimates: list[Attempt]
    solutions: list[Attempt]
    seconds: dict[str, float] = field(default_factory=dict)

    def trained(self, config: Config) -> list[Attempt]:
        """The attempts the update is made from (paper: 6 B of them; with `reuse_estimates` the estimates as well)."""
        attempts = [] if config.control == "frozen_proposer" else list(self.proposals)
        attempts += self.solutions + (self.estimates if config.learn.reuse_estimates else [])
        return [attempt for attempt in attempts if attempt.scored]

    def trajectories(self, config: Config) -> list[Trajectory]:
        """What the learner gets; answers to one task share its number, proposals have none (-1)."""
        numbers: dict[int, int] = {}
        found = []
        for attempt in self.trained(config):
            solving = attempt.role is Role.SOLVE
            found.append(attempt.trajectory(numbers.setdefault(id(attempt.task), len(numbers)) if solving else -1))
        return found


class SelfPlay:
    """Everything a step needs except the weights. `held_out` says which programs evaluation keeps for itself."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        pool: ExecutorPool,
        prompts: PromptFormat,
        held_out: Callable[[str], bool] = lambda program: False,
    ) -> None:
        self.config = config
        self.rules = PRESETS[config.preset]
        self.engine, self.pool, self.prompts, self.held_out = engine, pool, prompts, held_out
        self.buffers = TaskBuffers(config.tasks.buffer_cap, self.rules)
        self.seconds: dict[str, float] = {}

    def step(self, params: Params, number: int) -> Step:
        """Algorithm 1, lines 3 to 14: from the buffers to rewarded trajectories. `number` counts from 1."""
        self.seconds.clear()
        proposals = self.propose(params, number, KINDS, ("step", number))
        self.validate(proposals, number)
        estimates = self.estimation_attempts(proposals)
        solutions = self.solution_attempts(number)
        # The samples that price the proposals and the solutions that are trained on are one generation.
        self.generate(params, estimates + solutions, "solve")
        self.judge(estimates + solutions)
        self.reward(proposals, estimates, solutions, number)
        return Step(number, proposals, estimates, solutions, dict(self.seconds))

    def seed(self, params: Params, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Fill each buffer to seed_factor * batch from the identity program, without updates (paper section 3.3.1).

        `stopped` is asked before every round; returns False if it said so before the buffers were full.
        """
        target = self.config.tasks.seed_factor * self.config.tasks.batch
        for turn in range(SEED_ROUNDS):
            # Induction needs programs, so it starts once deduction and abduction are full.
            missing = [kind for kind in KINDS if self.buffers.size(kind) < target]
            if not missing:
                return True
            if stopped():
                return False
            kinds = [kind for kind in missing if kind is not Kind.INDUCTION] or missing
            proposals = self.propose(params, 0, kinds, ("seed", turn))
            if not proposals:
                raise UserError(
                    f"seeding: no prompt for {' or '.join(kind.value for kind in kinds)} proposals fits into "
                    f"rollout.max_prompt = {self.config.rollout.max_prompt} tokens; raise it"
                )
            self.validate(proposals, 0, most=target)
        short = {kind.value: self.buffers.size(kind) for kind in KINDS if self.buffers.size(kind) < target}
        raise UserError(
            f"seeding: after {SEED_ROUNDS} rounds some buffers hold fewer than {target} valid tasks: {short}. "
            "The model proposes too few valid tasks; try another tasks.prompt_format or a smaller tasks.seed_factor"
        )

    def propose(
        self, params: Params, number: int, kinds: Sequence[Kind], identity: tuple[int | str, ...]
    ) -> list[Attempt]:
        """B responses of the proposer for each kind, each shown references drawn from the buffers.

        References are dropped until the prompt fits; where even one is too long, the batch has one proposal less.
        """
        settings = self.config.tasks
        attempts = []
        for kind in kinds:
            rng = Random(repr((self.config.seed, *identity, "references", kind.value)))
            for index in range(settings.batch):
                references = self.buffers.references(kind, settings.references, rng)
                ids = self.encode(self.prompts.propose(kind, references, settings.induction_inputs))
                while not self.engine.fits(ids) and len(references) > 1:
                    references = references[:-1]
                    ids = self.encode(self.prompts.propose(kind, references, settings.induction_inputs))
                if self.engine.fits(ids):
                    who = (*identity, Role.PROPOSE.value, kind.value, index)
                    attempts.append(Attempt(Role.PROPOSE, kind, who, ids, references))
        self.generate(params, attempts, "propose")
        return attempts

    def validate(self, proposals: Sequence[Attempt], number: int, most: int | None = None) -> None:
        """Parse, static rules, run, determinism; valid new tasks enter their buffer (up to `most`) in a fixed order."""
        with self.timed("validate"):
            checks = []
            for i, attempt in enumerate(proposals):
                proposal = self.prompts.parse_proposal(attempt.kind, attempt.references, attempt.response)
                attempt.proposal = proposal
                if proposal is None:
                    attempt.reason = "format"
                    continue
                attempt.outcome = Outcome.INVALID
                attempt.reason = proposal_rejection(proposal, self.config.tasks.induction_inputs) or ""
                if not attempt.reason:
                    inputs = distinct_inputs(proposal.inputs)[: self.config.tasks.induction_inputs]
                    attempt.proposal = replace(proposal, inputs=inputs)
                    checks.append(
                        Check(str(i), "validate", program=proposal.program, input=proposal.input, inputs=inputs)
                    )
            verdicts = self.pool.run_all(checks)
            for check, verdict in zip(checks, verdicts, strict=True):
                attempt = proposals[int(check.id)]
                if verdict.status == "infra":
                    attempt.scored = False
                if verdict.status != "ok":
                    attempt.reason = verdict.reason or verdict.status
                    continue
                self.accept(attempt, verdict.output, verdict.outputs, number, most)

    def accept(
        self, attempt: Attempt, output: str, outputs: Sequence[str], number: int, most: int | None
    ) -> None:
        """A proposal that ran: make it a task, refuse it if held out or seen before, else store it."""
        proposal = attempt.proposal
        assert proposal is not None
        pairs = tuple(zip(proposal.inputs, outputs, strict=True))  # induction; else both are empty
        task = Task(
            kind=attempt.kind,
            program=proposal.program,
            input=proposal.input,
            output=output,
            pairs=pairs,
            message=proposal.message,
            step=number,
            key=task_key(proposal),
        )
        if not self.engine.fits(self.encode(self.prompts.solve(task))):
            attempt.reason = "prompt_too_long"
            return
        attempt.task = task
        if self.held_out(task.program):
            attempt.outcome, attempt.reason = Outcome.DUPLICATE, "held_out"
        elif self.buffers.is_duplicate(task):
            attempt.outcome, attempt.reason = Outcome.DUPLICATE, "duplicate"
        else:
            attempt.outcome, attempt.reason = Outcome.VALID, ""
            if most is None or self.buffers.size(task.kind) < most:
                self.buffers.add(task)

    def estimation_attempts(self, proposals: Sequence[Attempt]) -> list[Attempt]:
        """n solver samples for each valid proposal, at the rollout temperature (paper Eq. 4)."""
        return [
            self.solve_attempt(attempt.task, (*attempt.identity, "estimate", sample))
            for attempt in proposals
            if attempt.outcome is Outcome.VALID and attempt.task is not None
            for sample in range(self.config.tasks.samples)
        ]

    def solution_attempts(self, number: int) -> list[Attempt]:
        """B tasks of each kind for the solver: fresh ones first, topped up from history (paper section 3.3.2)."""
        fresh = number if self.rules.solver_tasks == "this_step" else number - 1
        attempts = []
        for kind in KINDS:
            rng = Random(repr((self.config.seed, number, "solve", kind.value)))
            for index, task in enumerate(self.buffers.solver_batch(kind, self.config.tasks.batch, fresh, rng)):
                attempts.append(self.solve_attempt(task, ("step", number, Role.SOLVE.value, kind.value, index)))
        return attempts

    def solve_attempt(self, task: Task, identity: tuple[int | str, ...]) -> Attempt:
        """A solver's attempt at a task, not generated yet."""
        return Attempt(Role.SOLVE, task.kind, identity, self.encode(self.prompts.solve(task)), task=task)

    def judge(self, attempts: Sequence[Attempt]) -> None:
        """Parse each answer and have the executor verify it; the gold answer never reaches a program."""
        with self.timed("judge"):
            checks = []
            for i, attempt in enumerate(attempts):
                assert attempt.task is not None
                attempt.answer = self.prompts.parse_answer(attempt.kind, attempt.response)
                if attempt.answer is not None:
                    checks.append(answer_check(str(i), attempt.task, attempt.answer))
            for verdict in self.pool.run_all(checks):
                attempt = attempts[int(verdict.id)]
                attempt.correct = verdict.correct
                attempt.scored = verdict.status != "infra"

    def reward(
        self, proposals: Sequence[Attempt], estimates: Sequence[Attempt], solutions: Sequence[Attempt], number: int
    ) -> None:
        """Learnability for proposals, correctness for solutions, format for both (paper Eqs. 4 to 6)."""
        outcomes: dict[tuple[int | str, ...], list[bool]] = {}
        for attempt in estimates:
            if attempt.scored:
                outcomes.setdefault(attempt.identity[:-2], []).append(attempt.correct)
        for attempt in proposals:
            if attempt.outcome is Outcome.VALID:
                judged = outcomes.get(attempt.identity)
                if not judged:
                    attempt.scored = False
                    continue
                attempt.solve_rate = sum(judged) / len(judged)
            attempt.reward = proposer_reward(attempt.outcome, attempt.solve_rate, self.rules)
            if self.config.control == "constant_learnability" and attempt.outcome is Outcome.VALID:
                attempt.reward = CONSTANT_LEARNABILITY
        for attempt in [*estimates, *solutions]:
            attempt.reward = solver_reward(attempt.answer, attempt.correct)
        if self.config.control == "random_rewards":
            rng = Random(repr((self.config.seed, number, "random rewards")))
            for attempt in [*proposals, *estimates, *solutions]:
                attempt.reward = rng.choice((1.0, -0.5))

    def generate(self, params: Params, attempts: Sequence[Attempt], phase: str) -> None:
        """Sample a response for every attempt at the rollout temperature, each with a random key of its own."""
        with self.timed(phase):
            temperature = self.config.rollout.temperature
            requests = [
                Request(attempt.prompt, request_key(self.config.seed, *attempt.identity), temperature)
                for attempt in attempts
            ]
            for attempt, completion in zip(attempts, self.engine.generate(params, requests), strict=True):
                attempt.completion = completion
                attempt.response = self.engine.text(completion)

    def encode(self, text: str) -> tuple[int, ...]:
        """Prompt ids."""
        return self.engine.tokenizer.prompt(text)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block to `seconds[phase]`."""
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


def answer_check(identity: str, task: Task, answer: str) -> Check:
    """The executor request that judges `answer` to `task`; induction is judged on the hidden pairs."""
    return Check(
        id=identity,
        op="judge",
        kind=task.kind.value,
        program="" if task.kind is Kind.INDUCTION else task.program,
        output=task.output,
        pairs=task.hidden,
        answer=answer,
    )
