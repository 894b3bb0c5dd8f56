"""What hosts tell each other about their attempts, as bytes: token ids, log-probabilities, verdicts.

Texts are not sent: a response is its tokens, a prompt follows from the buffers, which all hosts have, and an answer
from the response. Only a valid proposal brings its task, since the executor knows the outputs. JSON and raw arrays;
nothing in it is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from azr_jax.attempts import Attempt
from azr_jax.rollout.request import Completion
from azr_jax.tasks.kinds import Role, Task
from azr_jax.tasks.rewards import Outcome

Identity = tuple[int | str, ...]  # of an attempt

TOKEN, LOGPROB = np.dtype("<i4"), np.dtype("<f4")


@dataclass(frozen=True)
class News:
    """What became of an attempt on another host. task: of a proposal, if the executor could run it."""

    completion: Completion
    outcome: Outcome
    reason: str
    correct: bool
    scored: bool
    task: Task | None


def pack(attempts: Iterable[Attempt]) -> bytes:
    """The length of a JSON text (8 bytes), the text, all token ids (int32), all log-probabilities (float32)."""
    rows: list[dict[str, Any]] = []
    completions: list[Completion] = []
    for attempt in attempts:
        assert attempt.completion is not None
        completions.append(attempt.completion)
        task = attempt.task if attempt.role is Role.PROPOSE else None
        rows.append(
            {
                "identity": attempt.identity,
                "tokens": len(attempt.completion.tokens),
                "finish": attempt.completion.finish,
                "version": attempt.completion.version,
                "outcome": attempt.outcome.value,
                "reason": attempt.reason,
                "correct": attempt.correct,
                "scored": attempt.scored,
                "task": task.to_json() if task is not None else None,
            }
        )
    text = json.dumps(rows).encode("ascii")
    arrays = [c.tokens.astype(TOKEN).tobytes() for c in completions]
    arrays += [c.logprobs.astype(LOGPROB).tobytes() for c in completions]
    return b"".join([len(text).to_bytes(8, "little"), text, *arrays])


def unpack(data: bytes) -> dict[Identity, News]:
    """Inverse of `pack`, by the identity of attempts."""
    start = 8 + int.from_bytes(data[:8], "little")
    rows = json.loads(data[8:start])
    total = sum(row["tokens"] for row in rows)
    tokens = np.frombuffer(data, TOKEN, total, start).astype(np.int32)
    logprobs = np.frombuffer(data, LOGPROB, total, start + tokens.nbytes).astype(np.float32)
    news: dict[Identity, News] = {}
    at = 0
    for row in rows:
        part = slice(at, at := at + row["tokens"])
        news[tuple(row["identity"])] = News(
            Completion(tokens[part], logprobs[part], row["finish"], row["version"]),
            Outcome(row["outcome"]),
            row["reason"],
            row["correct"],
            row["scored"],
            Task.from_json(row["task"]) if row["task"] is not None else None,
        )
    return news
