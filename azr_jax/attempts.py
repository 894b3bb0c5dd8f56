"""A response of the policy and what became of it, and all of them that make a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from azr_jax.config import Config
from azr_jax.learn.packing import Trajectory
from azr_jax.rollout.request import Completion
from azr_jax.tasks.kinds import Kind, Proposal, Role, Task, group_index
from azr_jax.tasks.rewards import Outcome


@dataclass(eq=False)
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

    @property
    def attempts(self) -> list[Attempt]:
        """All of them."""
        return [*self.proposals, *self.estimates, *self.solutions]

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
