"""What is asked of the executor and what it answers: the `check` protocol as two frozen dataclasses and their JSON.

A request names an operation on a program; a verdict carries a status and plain text, never an object of the program.
Values travel as canonical text (`values.py`). Reading a request never raises anything but `BadRequest`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

#: Every status a verdict can have. `infra` is our own fault, after one retry: such a sample is never scored.
STATUSES = (
    "ok",
    "syntax_error",
    "rejected",
    "error",
    "timeout",
    "memory",
    "output_limit",
    "nondeterministic",
    "unsupported_value",
    "crashed",
    "infra",
)
OPS = ("run", "validate", "judge")
KINDS = ("deduction", "abduction", "induction")


@dataclass(frozen=True)
class Request:
    """One question to the executor; which fields matter depends on `op` and `kind`.

    run, validate: `program` and `input` (or `inputs`, all of which must pass). judge: deduction compares `answer` with
    `output`; abduction runs `program` on `answer` and compares with `output`; induction runs `answer`, a program, on
    every input of `pairs`. Gold values (`output`, `pairs`) stay in the broker process; no program ever sees them.
    """

    id: str
    op: str
    kind: str = ""
    program: str = ""
    input: str = ""
    inputs: tuple[str, ...] = ()
    output: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer to the request with the same `id`.

    `status` is one of STATUSES; for `judge` it is "ok" whenever the answer could be judged, right or wrong, and
    `reason` then says why a wrong one is wrong. `error_type` is the class name of an exception the program raised,
    `reason` the code of a rejection.
    """

    id: str
    status: str
    output: str = ""
    outputs: tuple[str, ...] = ()
    correct: bool = False
    passed: int = 0
    total: int = 0
    error_type: str = ""
    reason: str = ""


_WIRE_FIELDS = [field.name for field in fields(Request) if field.name != "id"]
_VERDICT_FIELDS = [field.name for field in fields(Verdict)]


class BadRequest(ValueError):
    """A request that breaks the protocol; the message says which field and how."""


def request_from_json(text: str) -> tuple[Any, Request]:
    """Parse one line of the `check` protocol; returns the id as the caller wrote it, and the request with id "".

    Raises BadRequest; its `args[1]`, if there, is the id that could still be read.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("not a JSON object") from None
    if not isinstance(data, dict):
        raise BadRequest("not a JSON object")
    identity = data.get("id")
    if identity is not None and not isinstance(identity, str | int | float):
        raise BadRequest("id: must be text or a number")
    try:
        return identity, _request(data)
    except BadRequest as error:
        raise BadRequest(error.args[0], identity) from None


def _request(data: dict[str, Any]) -> Request:
    op, kind = data.get("op"), data.get("kind", "")
    if op not in OPS:
        raise BadRequest(f"op: must be one of {', '.join(OPS)}")
    if op == "judge" and kind not in KINDS:
        raise BadRequest(f"kind: must be one of {', '.join(KINDS)}")
    needed = {
        "run": ("program",),
        "validate": ("program",),
        "deduction": ("output", "answer"),
        "abduction": ("program", "output", "answer"),
        "induction": ("pairs", "answer"),
    }[kind if op == "judge" else op]
    for name in needed:
        if name not in data:
            raise BadRequest(f"{name}: missing")
    if op != "judge" and ("input" in data) == ("inputs" in data):
        raise BadRequest("input: give either input or inputs")
    texts = {name: _text(data, name) for name in ("program", "input", "output", "answer")}
    inputs = data.get("inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise BadRequest("inputs: must be a list of texts")
    if op != "judge" and "inputs" in data and not inputs:
        raise BadRequest("inputs: must not be empty")
    return Request(id="", op=op, kind=kind or "", inputs=tuple(inputs), pairs=_pairs(data), **texts)


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise BadRequest(f"{name}: must be text")
    return value


def _pairs(data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    pairs = data.get("pairs", [])
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    )
    if not good:
        raise BadRequest("pairs: must be a list of [input, output] texts")
    if data.get("op") == "judge" and data.get("kind") == "induction" and not pairs:
        raise BadRequest("pairs: must not be empty")
    return tuple((pair[0], pair[1]) for pair in pairs)


def verdict_fields(request: Request, verdict: Verdict) -> dict[str, Any]:
    """The fields of a `check` answer, less the id: only those that mean something for the request."""
    answer: dict[str, Any] = {"status": verdict.status}
    if request.op == "judge":
        answer["correct"] = verdict.correct
        if request.kind == "induction":
            answer |= {"passed": verdict.passed, "total": verdict.total}
    elif verdict.status == "ok":
        answer |= {"outputs": list(verdict.outputs)} if request.inputs else {"output": verdict.output}
    if verdict.error_type:
        answer["error_type"] = verdict.error_type
    if verdict.reason:
        answer["reason"] = verdict.reason
    return answer


def request_to_wire(request: Request) -> dict[str, Any]:
    """A request as a JSON-able dict with the fields that are set, less the id."""
    return {name: value for name in _WIRE_FIELDS if (value := getattr(request, name))}


def request_from_wire(data: dict[str, Any]) -> Request:
    """The inverse of `request_to_wire` after a trip through JSON, which turns tuples into lists."""
    inputs = tuple(data.pop("inputs", ()))
    pairs = tuple((given, expected) for given, expected in data.pop("pairs", ()))
    return Request(inputs=inputs, pairs=pairs, **data)


def verdict_to_wire(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a JSON-able dict with the fields that are set."""
    return {name: value for name in _VERDICT_FIELDS if (value := getattr(verdict, name))}


def verdict_from_wire(data: dict[str, Any]) -> Verdict:
    """The inverse of `verdict_to_wire` after a trip through JSON."""
    outputs = tuple(data.pop("outputs", ()))
    return Verdict(outputs=outputs, **data)
