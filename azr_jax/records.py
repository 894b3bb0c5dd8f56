"""What a step leaves in the run folder besides its metrics: tasks, rollouts, flagged texts.

Not here: the files themselves, and what makes them survive a kill (telemetry/run_folder.py).
"""

from __future__ import annotations

from typing import Any

from azr_jax.attempts import Attempt, Step
from azr_jax.config import Config
from azr_jax.models.tokenizer import Tokenizer
from azr_jax.tasks.kinds import Role
from azr_jax.telemetry import oversight
from azr_jax.telemetry.run_folder import RunFolder


def write_rows(folder: RunFolder, step: Step, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """Tasks, rollouts and flagged texts of a step; returns its oversight/ metrics."""
    valid = [a for a in step.proposals if a.task is not None]
    folder.append_tasks(
        step.number,
        [a.task.to_json() | {"outcome": a.outcome.value, "solve_rate": a.solve_rate} for a in valid if a.task],
    )
    shown = [*step.proposals, *step.solutions]
    folder.write_rollouts(step.number, [_rollout(a, tokenizer.decode(a.prompt), config) for a in shown])
    records, flags, flagged = [], [], 0
    for attempt in shown:
        found = oversight.scan(attempt.response, attempt.proposal.program if attempt.proposal else "")
        flags += found
        flagged += bool(found)
        records += [
            {"step": step.number, "role": attempt.role.value, "kind": attempt.kind.value, "response": attempt.response}
            | {"category": flag.category, "rule": flag.rule, "excerpt": flag.excerpt}
            for flag in found
        ]
    folder.append_oversight(records)
    row = {"oversight/scanned": float(len(shown)), "oversight/flagged_share": flagged / max(len(shown), 1)}
    return row | {f"oversight/flags/{category}": float(n) for category, n in oversight.counts(flags).items()}


def _rollout(attempt: Attempt, prompt: str, config: Config) -> dict[str, Any]:
    verdict = attempt.reason or attempt.outcome.value
    if attempt.role is Role.SOLVE:
        verdict = "correct" if attempt.correct else ("wrong" if attempt.answer is not None else "format")
        verdict = verdict if attempt.scored else "infra"
    return {
        "role": attempt.role.value,
        "kind": attempt.kind.value,
        "prompt": prompt,
        "response": attempt.response,
        "verdict": verdict,
        "solve_rate": attempt.solve_rate,
        "reward": attempt.reward,
        "trained": attempt.scored
        and config.control != "no_updates"
        and not (attempt.role is Role.PROPOSE and config.control == "frozen_proposer"),
    }
