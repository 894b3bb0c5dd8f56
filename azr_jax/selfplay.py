"""The algorithm: propose, validate, estimate learnability, solve, reward. Read beside Algorithm 1 of arXiv 2505.03335.

One step is a pure function of (weights, buffers, seed, step): random choices come from generators made from the seed
and the step, samples from keys made of what they are, and where the order of events matters (which of two equal
proposals is the new one) it is the order of proposals, not of time. So a resumed run repeats itself exactly, although
nothing in a step waits for anything it does not need: a proposal is checked while others are written, and the samples
that price it start the moment it is valid. The step ends with trajectories and rewards; the policy-gradient update is
`azr_jax.learn`, the run around it `azr_jax.train`.

Not here: what follows from each response (round.py), text (tasks/), running programs (executor/), sampling (rollout/).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random

from azr_jax.attempts import Attempt, Step
from azr_jax.config import PRESETS, Config
from azr_jax.dist.hosts import Hosts
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool, Verdict
from azr_jax.models.transformer import Params
from azr_jax.rollout.engine import Engine
from azr_jax.round import Round
from azr_jax.stream import Stopped
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.tasks.kinds import KINDS, Kind, Role, Task
from azr_jax.tasks.prompts import PromptFormat
from azr_jax.tasks.rewards import Outcome, proposer_reward, solver_reward
from azr_jax.tasks.validation import task_key

SEED_ROUNDS = 60  # of one batch per kind, before a model that proposes nothing valid is given up
CONSTANT_LEARNABILITY = 0.5  # reward of every valid new task under that control


class SelfPlay:
    """Everything a step needs except the weights. `held_out` says which programs evaluation keeps for itself."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        pool: ExecutorPool,
        prompts: PromptFormat,
        held_out: Callable[[str], bool] = lambda program: False,
        hosts: Hosts | None = None,
    ) -> None:
        """hosts: those that share every step; None: this one alone."""
        self.config = config
        self.hosts = hosts or Hosts()
        self.rules = PRESETS[config.preset]
        self.engine, self.pool, self.prompts, self.held_out = engine, pool, prompts, held_out
        self.buffers = TaskBuffers(config.tasks.buffer_cap, self.rules)
        self._lengths: dict[tuple[Role, Kind], float] = defaultdict(lambda: 1.0)  # mean response of the last step

    def step(self, params: Params, number: int, stopped: Callable[[], bool] = lambda: False) -> Step:
        """Algorithm 1, lines 3 to 14: from the buffers to rewarded trajectories. `number` counts from 1.

        Stopped (stream.py): `stopped` said so; buffers are as before.
        """
        started = time.monotonic()
        self.engine.load(params, number)
        play = Round(self, number, stopped)
        play.propose(self.proposals(number, KINDS, ("step", number)))
        play.solve(self.old_tasks(number))
        play.run()
        play.store()
        step = play.step()
        self.reward(step)
        for role, kind in {(attempt.role, attempt.kind) for attempt in step.attempts}:
            lengths = [
                len(a.completion.tokens) for a in step.attempts if (a.role, a.kind) == (role, kind) and a.completion
            ]
            self._lengths[role, kind] = sum(lengths) / max(1, len(lengths))
        step.seconds["rollout"] = time.monotonic() - started
        return step

    def seed(self, params: Params, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Fill each buffer to seed_factor * batch from the identity program, without updates (paper section 3.3.1).

        Returns False if `stopped` said so before the buffers were full.
        """
        target = self.config.tasks.seed_factor * self.config.tasks.batch
        for turn in range(SEED_ROUNDS):
            # Induction needs programs, so it starts once deduction and abduction are full.
            missing = [kind for kind in KINDS if self.buffers.size(kind) < target]
            if not missing:
                return True
            kinds = [kind for kind in missing if kind is not Kind.INDUCTION] or missing
            proposals = self.proposals(0, kinds, ("seed", turn))
            if not proposals:
                raise UserError(
                    f"seeding: no prompt for {' or '.join(kind.value for kind in kinds)} proposals fits into "
                    f"rollout.max_prompt = {self.config.rollout.max_prompt} tokens; raise it"
                )
            self.engine.load(params)
            play = Round(self, 0, stopped, pricing=False)
            play.propose(proposals)
            try:
                play.run()
            except Stopped:
                return False
            play.store(most=target)
        short = {kind.value: self.buffers.size(kind) for kind in KINDS if self.buffers.size(kind) < target}
        raise UserError(
            f"seeding: after {SEED_ROUNDS} rounds some buffers hold fewer than {target} valid tasks: {short}. "
            "The model proposes too few valid tasks; try another tasks.prompt_format or a smaller tasks.seed_factor"
        )

    def proposals(self, number: int, kinds: Sequence[Kind], identity: tuple[int | str, ...]) -> list[Attempt]:
        """B proposals to be made for each kind, each shown references drawn from the buffers.

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
        return attempts

    def old_tasks(self, number: int) -> dict[Kind, list[Task]]:
        """B tasks of each kind from the buffers, for the solver.

        Where the preset's solver trains on this step's tasks, each stands in for the proposal in its place, should
        that turn out to be none (paper section 3.3.2); else they are last step's, topped up from history, and all are
        used.
        """
        found = {}
        for kind in KINDS:
            rng = Random(repr((self.config.seed, number, "solve", kind.value)))
            last = number - 1 if self.rules.solver_tasks == "last_step" else None
            batch = self.buffers.solver_batch(kind, self.config.tasks.batch, last, rng)
            # All fitted when they were stored; a resumed run may have a smaller rollout.max_prompt.
            found[kind] = [task for task in batch if self.engine.fits(self.encode(self.prompts.solve(task)))]
        return found

    def solve_attempt(self, task: Task, identity: tuple[int | str, ...]) -> Attempt:
        """A solver's attempt at a task, not generated yet."""
        return Attempt(Role.SOLVE, task.kind, identity, self.encode(self.prompts.solve(task)), task=task)

    def task_of(self, attempt: Attempt, verdict: Verdict, number: int) -> Task:
        """The task that a proposal is, now that the executor knows its outputs."""
        proposal = attempt.proposal
        assert proposal is not None
        pairs = tuple(zip(proposal.inputs, verdict.outputs, strict=True))  # induction; else both are empty
        return Task(
            kind=attempt.kind,
            program=proposal.program,
            input=proposal.input,
            output=verdict.output,
            pairs=pairs,
            message=proposal.message,
            step=number,
            key=task_key(proposal),
        )

    def reward(self, step: Step) -> None:
        """Learnability for proposals, correctness for solutions, format for both (paper Eqs. 4 to 6)."""
        outcomes: dict[tuple[int | str, ...], list[bool]] = {}
        for attempt in step.estimates:
            if attempt.scored:
                outcomes.setdefault(attempt.identity[:-2], []).append(attempt.correct)
        for attempt in step.proposals:
            if attempt.outcome is Outcome.VALID:
                judged = outcomes.get(attempt.identity)
                if not judged:
                    attempt.scored = False
                    continue
                attempt.solve_rate = sum(judged) / len(judged)
            attempt.reward = proposer_reward(attempt.outcome, attempt.solve_rate, self.rules)
            if self.config.control == "constant_learnability" and attempt.outcome is Outcome.VALID:
                attempt.reward = CONSTANT_LEARNABILITY
        for attempt in [*step.estimates, *step.solutions]:
            attempt.reward = solver_reward(attempt.answer, attempt.correct)
        if self.config.control == "random_rewards":
            rng = Random(repr((self.config.seed, step.number, "random rewards")))
            for attempt in step.attempts:
                attempt.reward = rng.choice((1.0, -0.5))

    def priority(self, role: Role, kind: Kind) -> float:
        """What hangs on a response, in tokens to come: longest first leaves no straggler for the end."""
        own = self._lengths[role, kind]
        return own + self._lengths[Role.SOLVE, kind] if role is Role.PROPOSE else own

    def encode(self, text: str) -> tuple[int, ...]:
        """Prompt ids."""
        return self.engine.tokenizer.prompt(text)
