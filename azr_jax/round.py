"""One step in the making: what follows from each response and each verdict, whenever it comes.

On many hosts every host has the same buffers and makes the same list of proposals, but has only its share of them
written, every n-th; what follows from a proposal happens where it was written. Then the hosts tell each other what
became of their attempts (exchange.py), and each goes on with all of them, as if everything had happened there.

Not here: what a step is made of and worth (selfplay.py), waiting (stream.py), talking to other hosts (dist/).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from azr_jax.attempts import Attempt, Step
from azr_jax.exchange import Identity, News, pack, unpack
from azr_jax.executor import Request as Check
from azr_jax.executor import Verdict
from azr_jax.stream import Stopped, Stream
from azr_jax.tasks.kinds import KINDS, Kind, Role, Task
from azr_jax.tasks.rewards import Outcome
from azr_jax.tasks.validation import distinct_inputs, proposal_rejection

if TYPE_CHECKING:
    from azr_jax.selfplay import SelfPlay

log = logging.getLogger(__name__)

Place = tuple[Kind, int]  # of the B places of each kind


class Round:
    """A step's attempts, and how each leads to others.

    pricing: whether valid proposals are priced by the solver, and solved; not so while seeding.
    """

    def __init__(
        self, play: SelfPlay, number: int, stopped: Callable[[], bool] = lambda: False, pricing: bool = True
    ) -> None:
        self.play, self.number, self.pricing = play, number, pricing
        self.stream = Stream(play.engine, play.pool, play.config.seed, play.config.rollout.temperature, stopped)
        self.proposed: list[Attempt] = []
        self.estimates: dict[Attempt, list[Attempt]] = {}  # by proposal
        self.fresh: dict[Attempt, Attempt] = {}  # solutions of this step's tasks, by proposal
        self.old: dict[Place, Attempt] = {}  # solutions of tasks from the buffers, by place
        self.history: dict[Kind, list[Task]] = {kind: [] for kind in KINDS}  # the stand-in of each place
        self.newest: dict[str, Attempt] = {}  # the valid proposal of each canonical task
        self.untold: list[Attempt] = []  # asked for here, and not known to the other hosts yet

    def propose(self, attempts: list[Attempt]) -> None:
        """Have these proposals written."""
        self.proposed = attempts
        for attempt in attempts:
            self.ask(attempt, place_of(attempt), self.read_proposal)

    def ask(self, attempt: Attempt, place: Place, then: Callable[[Attempt], None]) -> None:
        """Have the policy respond, on the host whose place it is."""
        kind, index = place
        if self.play.hosts.owns(KINDS.index(kind) * self.play.config.tasks.batch + index):
            self.untold.append(attempt)
            self.stream.respond(attempt, then, self.play.priority(attempt.role, attempt.kind))

    def solve(self, tasks: dict[Kind, list[Task]]) -> None:
        """Tasks from the buffers: all of them at once, or each if the proposal in its place is no new task."""
        self.history = tasks
        waiting: set[Place] = set()
        if self.play.rules.solver_tasks == "this_step":
            waiting = {place_of(attempt) for attempt in self.proposed}
        for kind in KINDS:
            for index in range(len(tasks[kind])):
                if (kind, index) not in waiting:
                    self.solve_old(kind, index)

    def run(self) -> None:
        """Until every response is judged, here and on all other hosts."""
        self.share("responses")
        self.share("stand-ins")  # for what turned out to be a duplicate of another host's proposal

    def share(self, what: str) -> None:
        """Finish what is under way, then hear what became of the other hosts' attempts, as if it had happened here.

        Stopped, on all hosts: one of them was.
        """
        hosts, told = self.play.hosts, None
        try:
            self.stream.run()
            counted = set(self.step().attempts)  # without what was withdrawn
            told = pack(attempt for attempt in self.untold if attempt in counted)
        except Stopped:
            log.debug("stopped in the middle of step %d", self.number)
        heard = hosts.gather(f"step {self.number}, {what}", told, buffers=self.play.buffers.digest())
        if heard is None:
            self.play.engine.abandon()
            raise Stopped
        self.untold = []
        news: dict[Identity, News] = {}
        for host, data in enumerate(heard):
            news |= unpack(data) if host != hosts.index else {}
        for attempt in self.proposed:
            if found := news.get(attempt.identity):
                self.hear(attempt, found)
                attempt.proposal = self.play.prompts.parse_proposal(attempt.kind, attempt.references, attempt.response)
                attempt.task = found.task
                if found.outcome is Outcome.VALID:
                    self.accept(attempt)
                else:
                    self.refuse(attempt, found.outcome, found.reason)
        for attempt in self.step().attempts:
            if attempt.role is Role.SOLVE and (found := news.get(attempt.identity)):
                self.hear(attempt, found)
                attempt.answer = self.play.prompts.parse_answer(attempt.kind, attempt.response)

    def hear(self, attempt: Attempt, news: News) -> None:
        """What another host says about an attempt of its own."""
        attempt.completion, attempt.response = news.completion, self.play.engine.text(news.completion)
        attempt.correct, attempt.scored = news.correct, news.scored

    def store(self, most: int | None = None) -> None:
        """Valid tasks enter their buffer in the order of proposals, up to `most` in each."""
        for attempt in self.proposed:
            if attempt.outcome is Outcome.VALID and attempt.task is not None:
                if most is None or self.play.buffers.size(attempt.kind) < most:
                    self.play.buffers.add(attempt.task)

    def step(self) -> Step:
        """All attempts, in an order that does not depend on time."""
        estimates = [sample for proposal in self.proposed for sample in self.estimates.get(proposal, [])]
        solutions = []
        for kind in KINDS:
            solutions += [self.fresh[a] for a in self.proposed if a.kind is kind and a in self.fresh]
            solutions += [self.old[place] for place in sorted(self.old, key=lambda p: p[1]) if place[0] is kind]
        return Step(self.number, self.proposed, estimates, solutions)

    # What follows from a response

    def read_proposal(self, attempt: Attempt) -> None:
        """Format and static rules; what passes goes to the executor."""
        play = self.play
        inputs_wanted = play.config.tasks.induction_inputs
        proposal = play.prompts.parse_proposal(attempt.kind, attempt.references, attempt.response)
        attempt.proposal = proposal
        if proposal is None:
            return self.refuse(attempt, Outcome.BAD_FORMAT, "format")
        reason = proposal_rejection(proposal, inputs_wanted)
        if reason is not None:
            return self.refuse(attempt, Outcome.INVALID, reason)
        inputs = distinct_inputs(proposal.inputs)[:inputs_wanted]
        attempt.proposal = replace(proposal, inputs=inputs)
        self.stream.check(
            attempt,
            lambda name: Check(name, "validate", program=proposal.program, input=proposal.input, inputs=inputs),
            self.validated,
        )

    def validated(self, attempt: Attempt, verdict: Verdict) -> None:
        """A proposal that ran is a task; one that is too long, held out or known is of no use."""
        play = self.play
        if verdict.status == "infra":
            attempt.scored = False
        if verdict.status != "ok":
            return self.refuse(attempt, Outcome.INVALID, verdict.reason or verdict.status)
        task = play.task_of(attempt, verdict, self.number)
        if not play.engine.fits(play.encode(play.prompts.solve(task))):
            return self.refuse(attempt, Outcome.INVALID, "prompt_too_long")
        attempt.task = task
        if play.held_out(task.program):
            return self.refuse(attempt, Outcome.DUPLICATE, "held_out")
        if play.buffers.is_duplicate(task):
            return self.refuse(attempt, Outcome.DUPLICATE, "duplicate")
        self.accept(attempt)

    def accept(self, attempt: Attempt) -> None:
        """A valid task, new to the buffers. Of those that are equal the first in the order of proposals stays."""
        task = attempt.task
        assert task is not None
        rival = self.newest.get(task.key) if self.play.rules.duplicates == "reject" else None
        if rival is not None and self.proposed.index(rival) < self.proposed.index(attempt):
            return self.refuse(attempt, Outcome.DUPLICATE, "duplicate")
        self.newest[task.key] = attempt
        if rival is not None:
            self.withdraw(rival)
        attempt.outcome, attempt.reason = Outcome.VALID, ""
        if self.pricing:
            self.price(attempt, task)

    def price(self, proposal: Attempt, task: Task) -> None:
        """n solver samples at the rollout temperature (paper Eq. 4), and the solution that is trained on."""
        samples = range(self.play.config.tasks.samples)
        attempts = [self.play.solve_attempt(task, (*proposal.identity, "estimate", i)) for i in samples]
        self.estimates[proposal] = list(attempts)
        if self.play.rules.solver_tasks == "this_step":
            self.fresh[proposal] = self.play.solve_attempt(task, (*proposal.identity, Role.SOLVE.value))
            attempts.append(self.fresh[proposal])
        for attempt in attempts:
            self.ask(attempt, place_of(proposal), self.read_answer)

    def refuse(self, attempt: Attempt, outcome: Outcome, reason: str) -> None:
        """A proposal that is no new task; the solver gets one from the buffer instead."""
        attempt.outcome, attempt.reason = outcome, reason
        if self.pricing and self.play.rules.solver_tasks == "this_step":
            self.solve_old(*place_of(attempt))

    def withdraw(self, rival: Attempt) -> None:
        """An earlier proposal, written later, is the same task: this one was a duplicate."""
        solution = self.fresh.pop(rival, None)
        self.stream.drop(self.estimates.pop(rival, []) + ([solution] if solution else []))
        self.refuse(rival, Outcome.DUPLICATE, "duplicate")

    def solve_old(self, kind: Kind, index: int) -> None:
        """A solution of the task from the buffer that stands in this place, if there is one."""
        if index < len(self.history[kind]):
            who = ("step", self.number, Role.SOLVE.value, kind.value, index)
            attempt = self.play.solve_attempt(self.history[kind][index], who)
            self.old[kind, index] = attempt
            self.ask(attempt, (kind, index), self.read_answer)

    def read_answer(self, attempt: Attempt) -> None:
        """Parse an answer and have the executor verify it; the gold answer never reaches a program."""
        assert attempt.task is not None
        answer = self.play.prompts.parse_answer(attempt.kind, attempt.response)
        attempt.answer = answer
        if answer is not None:
            task = attempt.task
            self.stream.check(attempt, lambda name: answer_check(name, task, answer), self.judged)

    def judged(self, attempt: Attempt, verdict: Verdict) -> None:
        """The executor's word on an answer."""
        attempt.correct = verdict.correct
        attempt.scored = verdict.status != "infra"


def place_of(proposal: Attempt) -> Place:
    """Which of the B proposals of its kind it is."""
    index = proposal.identity[-1]
    assert isinstance(index, int)
    return proposal.kind, index


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
