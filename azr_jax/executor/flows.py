"""What each operation does, step by step: which runs it needs, and how their outcomes make a verdict.

A flow is a generator: it yields `Ask`s, gets back the outcomes (None for runs that were no longer wanted) and returns a
Verdict. Gold values are parsed and compared here, in the trusted process. Valid or correct only on explicit, complete
evidence; every other path ends in another status, with the reason code that metrics count.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from azr_jax.executor.protocol import Request, Verdict
from azr_jax.executor.runs import Outcome
from azr_jax.executor.sharing import shareable
from azr_jax.executor.suspicion import SUSPECT_RUNS, holds_set, mentions_address, suspicious
from azr_jax.executor.values import Arguments, comparison_key, parse_arguments, parse_value

MAX_PROGRAM = 32_768  #: characters of a program
MAX_INPUTS = 256  #: inputs or pairs of one request
_MAX_TIMEOUTS = 2  # of an induction answer; after that its remaining pairs count as failed


@dataclass(frozen=True)
class Ask:
    """Runs of one program, `inputs` in this order.

    `used`, one set an input, holds the workers that must not run it, and grows as runs start; without it, any will do.

    `stop(index, outcome)` may say that the rest is not needed.
    """

    program: str
    inputs: list[Arguments]
    used: list[set[int]] | None = None
    stop: Callable[[int, Outcome], bool] = lambda index, outcome: False


Outcomes = list[Outcome | None]
Flow = Generator[list[Ask], list[Outcomes], Verdict]


def flow_of(request: Request, runs: int, numeric: str, reject: Callable[[str], str | None]) -> Flow:
    """The flow of a request. `runs`: that must agree in `validate`; `reject`: the static rules for proposals."""
    if request.op == "run":
        return _run(request)
    if request.op == "validate":
        return _validate(request, runs, reject)
    if request.kind == "deduction":
        return _deduction(request, numeric)
    return _abduction(request, numeric) if request.kind == "abduction" else _induction(request, numeric)


def _run(request: Request) -> Flow:
    inputs, problem = _inputs(request)
    if problem:
        return Verdict(request.id, "rejected", reason=problem)
    (outcomes,) = yield [Ask(request.program, inputs, stop=_not_ok)]
    return _verdict_of(request, outcomes)


def _validate(request: Request, runs: int, reject: Callable[[str], str | None]) -> Flow:
    """Static rules; then a first run; then, in other workers and in reverse order, the runs that must agree with it."""
    inputs, problem = _inputs(request)
    problem = problem or reject(request.program) or ""
    if problem:
        status = "syntax_error" if problem == "syntax_error" else "rejected"
        return Verdict(request.id, status, reason=problem)
    # Inputs that may share a child need one set between them; the others go their own ways.
    used: list[set[int]] = [set()] * len(inputs)
    if len(inputs) > 1 and not shareable(request.program):
        used = [set() for _ in inputs]
    (outcomes,) = yield [Ask(request.program, inputs, used, _not_ok)]
    first = _verdict_of(request, outcomes)
    if first.status != "ok":
        return first
    keys = [comparison_key(outcome.value) for outcome in outcomes if outcome is not None]
    shows_address = any(mentions_address(text) for text in (first.output, *first.outputs))
    if shows_address or holds_set([*inputs]) or suspicious(request.program):
        runs = max(runs, SUSPECT_RUNS)
    # Backwards, so that what one input leaves behind meets the others in another order.
    differs = _differs([*reversed(keys)])
    again = yield [Ask(request.program, inputs[::-1], used[::-1], differs) for _ in range(runs - 1)]
    for outcomes in again:
        for index, outcome in enumerate(outcomes):
            if outcome is not None and outcome.status == "infra":
                return _failure(request, outcome)
            if outcome is None or differs(index, outcome):
                return Verdict(request.id, "nondeterministic", reason=_why_differs(outcome))
    return first


def _deduction(request: Request, numeric: str) -> Flow:
    """No code runs: the answer is a literal or it is wrong."""
    yield from ()
    try:
        gold = comparison_key(parse_value(request.output), numeric)
    except ValueError:
        return Verdict(request.id, "rejected", reason="bad_gold")
    try:
        correct = comparison_key(parse_value(request.answer), numeric) == gold
    except ValueError:
        return Verdict(request.id, "ok", reason="answer_not_literal")
    return Verdict(request.id, "ok", correct=correct, reason="" if correct else "different_value")


def _abduction(request: Request, numeric: str) -> Flow:
    """Any input will do whose output is the gold output."""
    try:
        gold = comparison_key(parse_value(request.output), numeric)
    except ValueError:
        return Verdict(request.id, "rejected", reason="bad_gold")
    try:
        arguments = parse_arguments(request.answer)
    except ValueError:
        return Verdict(request.id, "ok", reason="answer_not_literal")
    if len(request.program) > MAX_PROGRAM:
        return Verdict(request.id, "rejected", reason="too_long")
    ((outcome,),) = yield [Ask(request.program, [arguments])]
    if outcome is None or outcome.status == "infra":
        return _failure(request, outcome)
    if outcome.status != "ok":
        return Verdict(request.id, "ok", error_type=outcome.error_type, reason=_why_wrong(outcome))
    correct = comparison_key(outcome.value, numeric) == gold
    return Verdict(request.id, "ok", correct=correct, reason="" if correct else "different_value")


def _induction(request: Request, numeric: str) -> Flow:
    """The answer, a program, must map every input to its output; the outputs stay here."""
    if not request.pairs or len(request.pairs) > MAX_INPUTS:
        return Verdict(request.id, "rejected", reason="bad_gold")
    try:
        inputs = [parse_arguments(given) for given, _ in request.pairs]
        golds = [comparison_key(parse_value(expected), numeric) for _, expected in request.pairs]
    except ValueError:
        return Verdict(request.id, "rejected", reason="bad_gold")
    total = len(golds)
    if len(request.answer) > MAX_PROGRAM:
        return Verdict(request.id, "ok", total=total, reason="too_long")
    known: list[Outcome | None] = [None] * total

    def decided(index: int, outcome: Outcome) -> bool:
        known[index] = outcome
        return outcome.status in ("syntax_error", "rejected", "infra") or _tried(known) < total

    (outcomes,) = yield [Ask(request.answer, inputs, stop=decided)]
    fault = next((outcome for outcome in outcomes if outcome is not None and outcome.status == "infra"), None)
    if fault is not None:
        return _failure(request, fault)
    passed = 0
    reason = error_type = ""
    for outcome, gold in list(zip(outcomes, golds, strict=True))[: _tried(outcomes)]:
        if outcome is not None and outcome.status == "ok" and comparison_key(outcome.value, numeric) == gold:
            passed += 1
        elif outcome is not None and not reason:
            reason = _why_wrong(outcome)
            error_type = outcome.error_type
    correct = passed == total
    return Verdict(request.id, "ok", correct=correct, passed=passed, total=total, error_type=error_type, reason=reason)


def _tried(outcomes: Outcomes) -> int:
    """How many pairs count as tried: all, or those up to the last timeout allowed, in the order of the pairs.

    Later ones may have been run beside them, but whether they were must not show. Nothing is decided before every pair
    up to there is known.
    """
    timeouts = 0
    for index, outcome in enumerate(outcomes):
        if outcome is None:
            break
        timeouts += outcome.status == "timeout"
        if timeouts == _MAX_TIMEOUTS:
            return index + 1
    return len(outcomes)


def _inputs(request: Request) -> tuple[list[Arguments], str]:
    """Parsed inputs, and the reason code if there is something wrong with them."""
    if len(request.program) > MAX_PROGRAM:
        return [], "too_long"
    texts = request.inputs or (request.input,)
    if len(texts) > MAX_INPUTS:
        return [], "too_many_inputs"
    try:
        return [parse_arguments(text) for text in texts], ""
    except ValueError:
        return [], "bad_input"


def _why_wrong(outcome: Outcome) -> str:
    """The reason code of an answer whose run came to this."""
    if outcome.status == "ok":
        return "different_value"
    return outcome.reason if outcome.status == "rejected" else outcome.status


def _not_ok(index: int, outcome: Outcome) -> bool:
    return outcome.status != "ok"


def _differs(keys: list[str]) -> Callable[[int, Outcome], bool]:
    return lambda index, outcome: outcome.status != "ok" or comparison_key(outcome.value) != keys[index]


def _why_differs(outcome: Outcome | None) -> str:
    """A repeated run that fails is as bad as one that gives another value; say which it was."""
    return "" if outcome is None or outcome.status == "ok" else f"then_{outcome.status}"


def _verdict_of(request: Request, outcomes: Outcomes) -> Verdict:
    """The verdict of `run`: the outputs, or the first failure in the order of the inputs."""
    texts = []
    for outcome in outcomes:
        if outcome is not None and outcome.status == "ok":
            texts.append(outcome.text)
        elif outcome is not None:
            return _failure(request, outcome)
    if len(texts) < len(outcomes):
        return _failure(request, None)
    return Verdict(request.id, "ok", output=texts[0], outputs=tuple(texts) if request.inputs else ())


def _failure(request: Request, outcome: Outcome | None) -> Verdict:
    if outcome is None:  # not run, without a reason that we know of: fail closed
        return Verdict(request.id, "infra", reason="not_run")
    return Verdict(request.id, outcome.status, error_type=outcome.error_type, reason=outcome.reason)
