"""The algorithm, whole steps of it, with the embedded model and the real executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from azr_jax.attempts import Attempt, Step
from azr_jax.config import PRESETS, Config, ExecutorConfig, RolloutConfig, TasksConfig
from azr_jax.dist.hosts import Hosts
from azr_jax.errors import UserError
from azr_jax.executor import ExecutorPool, Verdict
from azr_jax.executor import Request as Check
from azr_jax.micro.language import is_held_out
from azr_jax.round import Round
from azr_jax.selfplay import CONSTANT_LEARNABILITY, SelfPlay
from azr_jax.stream import Stopped
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.tasks.kinds import GROUPS, KINDS, Kind, Proposal, Role, Task, group_index
from azr_jax.tasks.prompts import PromptFormat
from azr_jax.tasks.rewards import Outcome
from azr_jax.telemetry.metrics import unknown_names
from azr_jax.telemetry.step_metrics import step_metrics
from azr_jax.train import Run, with_prompts
from tests.hosts import on_hosts

CONFIG = Config(
    tasks=TasksConfig(batch=6, references=1, induction_inputs=4, samples=4, seed_factor=1),
    rollout=RolloutConfig(max_prompt=96, max_response=64, slots=32, page=32, prefill_tokens=512),
    executor=ExecutorConfig(workers=1),
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ExecutorPool]:
    with ExecutorPool(CONFIG.executor) as pool:
        yield pool


@pytest.fixture(scope="module")
def run(pool: ExecutorPool, two_devices: None) -> Run:
    run = Run(*with_prompts(CONFIG), pool)
    run.selfplay.seed(run.fresh_state().params)
    return run


@pytest.fixture(scope="module")
def step(run: Run) -> Step:
    return run.selfplay.step(run.fresh_state().params, 1)


def variant(run: Run, **changes: object) -> SelfPlay:
    """Another self-play over the same engine and pool."""
    return SelfPlay(replace(CONFIG, **changes), run.engine, run.pool, run.prompts, is_held_out)


def test_seeding_fills_every_buffer_with_valid_new_tasks(run: Run) -> None:
    for kind in KINDS:
        seeds = [task for task in run.selfplay.buffers.tasks(kind) if task.step == 0]
        assert len(seeds) >= CONFIG.tasks.seed_factor * CONFIG.tasks.batch
        assert len({task.key for task in seeds}) == len(seeds)
        assert not any(is_held_out(task.program) for task in seeds)


def test_seeding_stops_between_rounds(run: Run) -> None:
    play = variant(run)
    assert not play.seed(run.fresh_state().params, stopped=lambda: True)
    assert all(play.buffers.size(kind) == 0 for kind in KINDS)


def test_every_stored_task_is_true(run: Run, step: Step) -> None:
    """Gold outputs are what real Python gives: judged by the executor on the proposed input itself."""
    from azr_jax.round import answer_check

    checks = []
    for kind in KINDS:
        for task in run.selfplay.buffers.tasks(kind):
            answer = {Kind.DEDUCTION: task.output, Kind.ABDUCTION: task.input, Kind.INDUCTION: task.program}[kind]
            checks.append(answer_check(str(len(checks)), task, answer))
    assert checks and all(verdict.correct for verdict in run.pool.run_all(checks))


def test_a_step_has_the_shape_of_algorithm_1(step: Step) -> None:
    batch = CONFIG.tasks.batch
    assert len(step.proposals) == len(KINDS) * batch
    assert [sum(a.kind is kind for a in step.solutions) for kind in KINDS] == [batch] * 3
    valid = [a for a in step.proposals if a.outcome is Outcome.VALID]
    assert valid and len(step.estimates) == len(valid) * CONFIG.tasks.samples
    assert len(step.trained(CONFIG)) == 2 * len(KINDS) * batch
    assert len(step.trained(replace(CONFIG, control="frozen_proposer"))) == len(KINDS) * batch
    assert {group_index(a.role, a.kind) for a in step.trained(CONFIG)} == set(range(len(GROUPS)))


def test_solver_trains_on_this_steps_tasks_first(step: Step) -> None:
    fresh = {a.task.key for a in step.proposals if a.outcome is Outcome.VALID and a.task}
    for kind in KINDS:
        new = [key for key in fresh if key.startswith(kind.value)]
        used = {a.task.key for a in step.solutions if a.kind is kind and a.task}
        assert set(new) <= used


def test_rewards_follow_outcomes(step: Step) -> None:
    by_proposal: dict[tuple, list[bool]] = {}
    for sample in step.estimates:
        by_proposal.setdefault(sample.identity[:-2], []).append(sample.correct)
    for attempt in step.proposals:
        if attempt.outcome is Outcome.VALID:
            rate = np.mean(by_proposal[attempt.identity])
            assert attempt.solve_rate == pytest.approx(rate)
            assert attempt.reward == pytest.approx(0.0 if rate in (0, 1) else 1 - rate)
        elif attempt.outcome is Outcome.DUPLICATE:
            assert attempt.reward == 0.0
        else:
            assert attempt.reward == -1.0
    for attempt in step.solutions:
        wanted = -1.0 if attempt.answer is None else (1.0 if attempt.correct else -0.5)
        assert attempt.reward == wanted


def test_learnability_samples_of_a_task_differ(step: Step) -> None:
    """Samples drawn greedily would make every solve rate 0 or 1 (the released code's main branch)."""
    texts: dict[tuple, set[str]] = {}
    for sample in step.estimates:
        texts.setdefault(sample.identity[:-2], set()).add(sample.response)
    assert np.mean([len(group) > 1 for group in texts.values()]) > 0.5


def test_ids_reach_the_learner_untouched(step: Step) -> None:
    for attempt in step.trained(CONFIG):
        trajectory = attempt.trajectory(0)
        assert attempt.completion is not None
        assert trajectory.response is attempt.completion.tokens
        assert trajectory.logprobs is attempt.completion.logprobs


def test_a_step_is_a_function_of_weights_buffers_seed_and_number(run: Run, pool: ExecutorPool) -> None:
    params = run.fresh_state().params
    results = []
    for seed in (0, 0, 1):
        play = variant(run, seed=seed)
        play.seed(params)
        step = play.step(params, 1)
        results.append([(a.response, a.reward) for a in [*step.proposals, *step.estimates, *step.solutions]])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_held_out_programs_are_refused(run: Run) -> None:
    params = run.fresh_state().params
    play = SelfPlay(CONFIG, run.engine, run.pool, run.prompts, held_out=lambda program: "return x" in program)
    play.engine.load(params)
    made = Round(play, 0, pricing=False)
    proposals = play.proposals(0, KINDS[:1], ("test",))
    made.propose(proposals)
    made.run()
    made.store()
    refused = [a for a in proposals if a.reason == "held_out"]
    assert refused and all(a.outcome is Outcome.DUPLICATE for a in refused)
    assert not any("return x" in task.program for task in play.buffers.tasks(Kind.DEDUCTION))


def test_prompts_that_never_fit_are_named_as_the_mistake(run: Run) -> None:
    play = variant(run)
    play.engine = replace(run.engine, config=replace(run.engine.config, max_prompt=4))
    with pytest.raises(UserError, match="rollout.max_prompt = "):
        play.seed({})


@pytest.mark.parametrize("control", ["random_rewards", "constant_learnability"])
def test_controls_change_only_rewards(run: Run, control: str) -> None:
    params = run.fresh_state().params
    plain, controlled = variant(run), variant(run, control=control)
    steps = []
    for play in (plain, controlled):
        play.seed(params)
        steps.append(play.step(params, 1))
    texts = [[a.response for a in [*s.proposals, *s.estimates, *s.solutions]] for s in steps]
    assert texts[0] == texts[1]
    if control == "random_rewards":
        assert {a.reward for a in steps[1].solutions} <= {1.0, -0.5}
        assert [a.reward for a in steps[0].solutions] != [a.reward for a in steps[1].solutions]
    else:
        valid = [a.reward for a in steps[1].proposals if a.outcome is Outcome.VALID]
        assert valid and set(valid) == {CONSTANT_LEARNABILITY}


def test_presets_reach_the_step(run: Run) -> None:
    params = run.fresh_state().params
    play = variant(run, preset="reference")
    assert play.rules is PRESETS["reference"]
    play.seed(params)
    step = play.step(params, 1)
    # Last step's tasks are the seeds; this step's proposals wait for the next one.
    assert {a.task.step for a in step.solutions if a.task} == {0}
    extremes = [a.reward for a in step.proposals if a.solve_rate in (0.0, 1.0)]
    assert extremes and set(extremes) == {-0.5}
    assert not any(a.outcome is Outcome.DUPLICATE and a.reason == "duplicate" for a in step.proposals)


def test_what_our_own_fault_left_unjudged_is_not_trained_on(run: Run) -> None:
    class Broken:
        """A pool that answers everything with `infra`."""

        def __init__(self) -> None:
            self.asked: list[Check] = []

        def submit(self, requests: list[Check]) -> None:
            self.asked += requests

        def poll(self, timeout: float = 0.0) -> list[Verdict]:
            asked, self.asked = self.asked, []
            return [Verdict(id=request.id, status="infra") for request in asked]

    play = SelfPlay(CONFIG, run.engine, Broken(), run.prompts)  # type: ignore[arg-type]
    play.buffers = run.selfplay.buffers
    step = play.step(run.fresh_state().params, 50)
    unjudged = [a for a in step.solutions if a.answer is not None]
    assert unjudged and not any(a.scored for a in unjudged)
    assert not any(a.scored for a in step.proposals if a.reason == "infra")
    assert all(a.answer is None for a in step.trained(CONFIG))


def test_metrics_are_in_the_glossary(run: Run, step: Step) -> None:
    row = step_metrics(step, run.selfplay.buffers, run.prompts)
    assert unknown_names(row) == []
    assert 0 < row["propose/rate_between"] < 1 and row["solve/length/induction"] > 1


def test_prompts_that_do_not_fit_lose_references_not_the_run(run: Run) -> None:
    play = variant(run, tasks=replace(CONFIG.tasks, references=6))
    play.buffers = run.selfplay.buffers
    attempts: list[Attempt] = play.proposals(9, [Kind.DEDUCTION], ("test",))
    assert len(attempts) == CONFIG.tasks.batch
    assert all(run.engine.fits(a.prompt) and a.role is Role.PROPOSE for a in attempts)
    assert any(len(a.references) < 6 for a in attempts)


class Reordering:
    """A pool whose verdicts come late, several at a time and the last one first."""

    def __init__(self, pool: ExecutorPool, rng: Random) -> None:
        self.pool, self.rng = pool, rng
        self.held: list[Verdict] = []

    def submit(self, requests: list[Check]) -> None:
        self.pool.submit(requests)

    def poll(self, timeout: float = 0.0) -> list[Verdict]:
        self.held += self.pool.poll(min(timeout, 0.01))
        if timeout == 0.0 and self.rng.random() < 0.7:
            return []
        ready, self.held = self.held[::-1], []
        return ready


def test_a_step_does_not_depend_on_when_verdicts_come(run: Run, pool: ExecutorPool) -> None:
    params = run.fresh_state().params
    state = run.selfplay.buffers.to_json()
    found = []
    for judges in (pool, Reordering(pool, Random(1)), Reordering(pool, Random(2))):
        play = SelfPlay(CONFIG, run.engine, judges, run.prompts, is_held_out)  # type: ignore[arg-type]
        play.buffers = TaskBuffers.from_json(state, play.rules)
        step = play.step(params, 7)
        made = [(a.identity, a.prompt, a.response, a.outcome, a.reason, a.reward, a.scored) for a in step.attempts]
        found.append((made, play.buffers.to_json()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "the later one is checked first"])
def test_of_two_equal_proposals_the_first_is_the_new_one(run: Run, pool: ExecutorPool, order: tuple[int, int]) -> None:
    """Whichever is checked first; what was asked for the other is withdrawn and its place goes to an old task."""
    play = variant(run)
    play.buffers = run.selfplay.buffers
    made = Round(play, 8)
    twins = play.proposals(8, [Kind.DEDUCTION], ("step", 8))[:2]
    asked: list[Attempt] = []
    dropped: list[Attempt] = []
    made.stream.respond = lambda attempt, then, priority=0.0: asked.append(attempt)  # type: ignore[method-assign]
    made.stream.drop = dropped.extend  # type: ignore[method-assign]
    made.propose(twins)
    made.solve({kind: list(run.selfplay.buffers.tasks(kind))[: len(twins)] for kind in KINDS})
    program = "def f(x):\n    return (x, 'of two equal proposals')"
    for attempt in (twins[i] for i in order):
        attempt.proposal = Proposal(Kind.DEDUCTION, program, input="1")
        made.validated(attempt, Verdict(id="", status="ok", output="(1, 'of two equal proposals')"))
    assert [a.outcome for a in twins] == [Outcome.VALID, Outcome.DUPLICATE]
    step = made.step()
    samples = CONFIG.tasks.samples
    assert [a.identity[:-2] for a in step.estimates] == samples * [twins[0].identity]
    mine = [a for a in step.solutions if a.kind is Kind.DEDUCTION]
    assert [a.identity[:-1] for a in mine] == [twins[0].identity, ("step", 8, "solve", "deduction")]
    assert len(dropped) == (samples + 1 if order == (1, 0) else 0)
    assert not set(map(id, dropped)) & set(map(id, step.attempts))
    assert {id(a) for a in asked} == {id(a) for a in [*step.attempts, *dropped]}


def test_a_step_that_is_stopped_leaves_nothing_behind(run: Run, pool: ExecutorPool) -> None:
    """Neither in the engine nor in the buffers; made again it is the step it would have been."""
    params = run.fresh_state().params
    state = run.selfplay.buffers.to_json()

    def fresh() -> SelfPlay:
        play = SelfPlay(CONFIG, run.engine, pool, run.prompts, is_held_out)
        play.buffers = TaskBuffers.from_json(state, play.rules)
        return play

    whole = fresh().step(params, 9)
    broken, asked = fresh(), iter([False, False, False, True])
    with pytest.raises(Stopped):
        broken.step(params, 9, lambda: next(asked))
    assert not run.engine.busy and broken.buffers.to_json() == state
    again = broken.step(params, 9)
    assert [(a.identity, a.response, a.reward) for a in again.attempts] == [
        (a.identity, a.response, a.reward) for a in whole.attempts
    ]


class Copycat:
    """A prompt format in which every deduction proposal is read as the same program, new to the buffers."""

    def __init__(self, prompts: PromptFormat) -> None:
        self.prompts = prompts

    def __getattr__(self, name: str) -> object:
        return getattr(self.prompts, name)

    def parse_proposal(self, kind: Kind, references: Sequence[Task], response: str) -> Proposal | None:
        if kind is Kind.DEDUCTION:
            return Proposal(kind, "def f(x):\n    return (x, 'said by all hosts')", input="1")
        return self.prompts.parse_proposal(kind, references, response)


@pytest.mark.parametrize(
    ("preset", "count", "copycat"),
    [("fixed", 2, False), ("fixed", 4, True), ("paper", 3, True), ("reference", 3, False)],
)
def test_hosts_share_a_step_and_nothing_changes(
    run: Run, pool: ExecutorPool, preset: str, count: int, copycat: bool
) -> None:
    """Duplicates are resolved between hosts as within one, and every host ends with the same step and buffers."""
    params = run.fresh_state().params
    state = run.selfplay.buffers.to_json()
    prompts: Any = Copycat(run.prompts) if copycat else run.prompts

    def made(hosts: Hosts) -> object:
        play = SelfPlay(replace(CONFIG, preset=preset), run.engine, pool, prompts, is_held_out, hosts)
        play.buffers = TaskBuffers.from_json(state, play.rules)
        step = play.step(params, 11)
        attempts = [
            (a.identity, a.prompt, a.response, a.task, a.outcome, a.reason, a.answer, a.solve_rate, a.reward, a.scored)
            for a in step.attempts
        ]
        samples = [
            (a.completion.tokens.tolist(), a.completion.logprobs.tolist()) for a in step.attempts if a.completion
        ]
        return attempts, samples, play.buffers.to_json(), len(step.trajectories(play.config))

    alone = made(Hosts())
    assert all(found == alone for found in on_hosts(count, made))
    reasons = [attempt[5] for attempt in alone[0] if attempt[5] == "duplicate"]  # type: ignore[index]
    assert not copycat or preset == "paper" or len(reasons) >= CONFIG.tasks.batch - 1


def test_a_host_that_is_stopped_stops_the_step_on_all(run: Run, pool: ExecutorPool) -> None:
    params = run.fresh_state().params
    state = run.selfplay.buffers.to_json()

    def made(hosts: Hosts) -> object:
        play = SelfPlay(CONFIG, run.engine, pool, run.prompts, is_held_out, hosts)
        play.buffers = TaskBuffers.from_json(state, play.rules)
        asked = iter([False, False, True])
        try:
            return play.step(params, 12, lambda: hosts.index == 1 and next(asked))
        finally:
            assert play.buffers.to_json() == state and not run.engine.busy

    assert all(isinstance(found, Stopped) for found in on_hosts(3, made))
