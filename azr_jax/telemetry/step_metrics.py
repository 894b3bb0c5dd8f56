"""Figures of one self-play step, from its attempts (names: metrics.py). Shares of nothing are left out, not zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from azr_jax.attempts import Attempt, Step
from azr_jax.rollout.engine import EngineStats
from azr_jax.tasks.buffers import TaskBuffers
from azr_jax.tasks.kinds import KINDS, Kind
from azr_jax.tasks.prompts import PromptFormat
from azr_jax.tasks.rewards import Outcome, share_inside
from azr_jax.tasks.validation import program_key

Row = dict[str, float]


def step_metrics(step: Step, buffers: TaskBuffers, prompts: PromptFormat) -> Row:
    """reward/, solve/, propose/, buffer/, sampler/ and time/ metrics of a step."""
    row = buffers.metrics(step.number)
    for kind in KINDS:
        row |= _proposals([a for a in step.proposals if a.kind is kind], kind, prompts)
        row |= _solutions([a for a in step.solutions if a.kind is kind], kind, prompts, step.number)
    rates = [a.solve_rate for a in step.proposals if a.solve_rate is not None]
    if rates:
        row["propose/rate_between"] = share_inside(rates)
    # Programs of induction proposals are given, not proposed: they say nothing about the proposer's diversity.
    written = [a for a in step.proposals if a.task is not None and a.kind is not Kind.INDUCTION]
    row["propose/unique_programs"] = float(len(_programs(written)))
    row["propose/new_programs"] = float(len(_programs([a for a in written if a.outcome is Outcome.VALID])))
    for attempt in step.proposals:
        if attempt.reason:
            name = f"propose/reject/{attempt.reason.partition(':')[0]}"  # what follows is the model's own word
            row[name] = row.get(name, 0.0) + 1.0
    completions = [attempt.completion for attempt in step.attempts if attempt.completion is not None]
    row["sampler/sequences"] = float(len(completions))
    row["sampler/tokens"] = float(sum(len(completion.tokens) for completion in completions))
    row["sampler/truncated"] = sum(c.finish == "length" for c in completions) / max(1, len(completions))
    for phase, seconds in step.seconds.items():
        row[f"time/{phase}"] = seconds
    return row


def engine_metrics(before: EngineStats, after: EngineStats, seconds: float) -> Row:
    """perf/ metrics of what the engine did in `seconds` between two states of its totals."""

    def gained(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    row = {f"perf/{name}": gained(name) for name in ("prefilled", "shared", "preempted")}
    return row | {
        "perf/tokens_per_second": gained("tokens") / max(seconds, 1e-9),
        "perf/slot_use": gained("tokens") / max(gained("slot_steps"), 1.0),
        "perf/device_share": gained("device_seconds") / max(seconds, 1e-9),
    }


def _programs(attempts: Sequence[Attempt]) -> set[str]:
    return {program_key(attempt.task.program) for attempt in attempts if attempt.task is not None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _put(row: Row, name: str, attempts: Sequence[Attempt], value: Callable[[Attempt], float]) -> None:
    if attempts:
        row[name] = _mean([float(value(attempt)) for attempt in attempts])


def _length(attempt: Attempt) -> float:
    return len(attempt.completion.tokens) if attempt.completion is not None else 0


def _truncated(attempt: Attempt) -> bool:
    return attempt.completion is not None and attempt.completion.finish == "length"


def _proposals(attempts: list[Attempt], kind: Kind, prompts: PromptFormat) -> Row:
    row: Row = {}
    name = f"propose/{{}}/{kind.value}".format
    valid = [a for a in attempts if a.task is not None]
    rated = [a for a in attempts if a.solve_rate is not None]
    row[name("count")] = float(len(attempts))
    _put(row, f"reward/propose/{kind.value}", [a for a in attempts if a.scored], lambda a: a.reward)
    _put(row, name("parsed"), attempts, lambda a: a.proposal is not None)
    _put(row, name("valid"), attempts, lambda a: a.task is not None)
    _put(row, name("accepted"), attempts, lambda a: a.outcome is Outcome.VALID)
    _put(row, name("duplicate"), valid, lambda a: a.reason == "duplicate")
    _put(row, name("held_out"), valid, lambda a: a.reason == "held_out")
    _put(row, name("think_share"), attempts, lambda a: prompts.thinks(a.response))
    _put(row, name("length"), attempts, _length)
    _put(row, name("truncated"), attempts, _truncated)
    _put(row, name("statements"), valid, lambda a: a.task.program.count("\n") if a.task else 0)
    _put(row, name("solve_rate"), rated, lambda a: a.solve_rate or 0.0)
    _put(row, name("rate_between"), rated, lambda a: 0.0 < (a.solve_rate or 0.0) < 1.0)
    _put(row, name("rate_zero"), rated, lambda a: a.solve_rate == 0.0)
    _put(row, name("rate_one"), rated, lambda a: a.solve_rate == 1.0)
    return row


def _solutions(attempts: list[Attempt], kind: Kind, prompts: PromptFormat, number: int) -> Row:
    row: Row = {}
    name = f"solve/{{}}/{kind.value}".format
    judged = [a for a in attempts if a.scored]
    _put(row, f"reward/solve/{kind.value}", judged, lambda a: a.reward)
    _put(row, name("accuracy"), judged, lambda a: a.correct)
    _put(row, name("format_error"), attempts, lambda a: a.answer is None)
    _put(row, name("think_share"), attempts, lambda a: prompts.thinks(a.response))
    _put(row, name("length"), attempts, _length)
    _put(row, name("length_correct"), [a for a in judged if a.correct], _length)
    _put(row, name("length_wrong"), [a for a in judged if not a.correct], _length)
    _put(row, name("truncated"), attempts, _truncated)
    row[name("unjudged")] = float(len(attempts) - len(judged))
    _put(row, f"buffer/age_mean/{kind.value}", attempts, lambda a: number - a.task.step if a.task else 0)
    return row
