"""Alarms: what usually precedes the end of a self-play run, in words, from the rows of metrics.jsonl.

Thresholds are those that users of the published code and its replications report as the signs of collapse. An alarm
stops nothing: it says what to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from azr_jax.telemetry.metrics import KIND_NAMES

Row = Mapping[str, Any]

RATE_BETWEEN_MIN = 0.05
ACCEPTED_MIN, ACCEPTED_STEPS = 0.10, 20
DUPLICATE_MAX = 0.50
NO_NEW_STEPS = 10
LOGP_GAP_MEAN_MAX = 0.05  # nats; float32 agrees to 1e-5, bfloat16 to about 1e-2
TIMEOUT_MAX = 0.05
INFRA_MAX = 0.01
RECENT = 5  # steps that a noisy share is averaged over


def alarms(rows: Sequence[Row]) -> list[str]:
    """One sentence for each alarm that holds at the end of `rows`; [] if all is well or nothing is known."""
    found: list[str] = []
    between = _recent(rows, "propose/rate_between")
    if between is not None and between < RATE_BETWEEN_MIN:
        found.append(
            f"only {_percent(between)} of valid proposals have a solve rate between 0 and 1 (alarm below 5 %): "
            "the tasks are all too easy or all too hard, and the solver has little to learn from"
        )
    for kind in KIND_NAMES:
        found += _proposer_alarms(rows, kind)
    gap = _recent(rows, "learner/logp_gap_mean")
    if gap is not None and gap > LOGP_GAP_MEAN_MAX:
        found.append(
            f"sampler and learner differ by {gap:.3f} nats a token (alarm above {LOGP_GAP_MEAN_MAX}): "
            "the update is not on-policy"
        )
    if any(row.get("learner/skipped") for row in rows[-RECENT:]):
        found.append("an update of the last steps was skipped because its gradient was not finite")
    timeouts = _share_of_checks(rows, "executor/status_timeout")
    if timeouts > TIMEOUT_MAX:
        found.append(
            f"{_percent(timeouts)} of checks hit the time limit (alarm above 5 %): "
            "raise executor.wall_seconds, or look at what the proposer writes"
        )
    infra = _share_of_checks(rows, "executor/status_infra")
    if infra > INFRA_MAX:
        found.append(f"{_percent(infra)} of checks were lost through our own fault (alarm above 1 %): see the log")
    return found


def _proposer_alarms(rows: Sequence[Row], kind: str) -> list[str]:
    found = []
    if _lasting(rows, f"propose/accepted/{kind}", ACCEPTED_STEPS, lambda share: share < ACCEPTED_MIN):
        found.append(f"{kind}: fewer than 10 % of proposals were accepted in each of the last {ACCEPTED_STEPS} steps")
    duplicates = _recent(rows, f"propose/duplicate/{kind}")
    if duplicates is not None and duplicates > DUPLICATE_MAX:
        found.append(
            f"{kind}: {_percent(duplicates)} of valid proposals repeat earlier ones (alarm above 50 %): "
            "the proposer is losing diversity"
        )
    if _lasting(rows, f"buffer/new/{kind}", NO_NEW_STEPS, lambda count: count == 0):
        found.append(f"{kind}: no new task in the last {NO_NEW_STEPS} steps")
    return found


def _recent(rows: Sequence[Row], name: str) -> float | None:
    """Mean of the last RECENT values; None if there are fewer."""
    values = [row[name] for row in rows if row.get(name) is not None][-RECENT:]
    return sum(values) / RECENT if len(values) == RECENT else None


def _share_of_checks(rows: Sequence[Row], name: str) -> float:
    """A status's share of the executor's checks over the last RECENT steps; its counters restart when a run resumes."""
    counted = [row for row in rows if row.get("executor/requests")]
    if not counted:
        return 0.0
    last = counted[-1]
    before: Row = counted[-1 - RECENT] if len(counted) > RECENT else {}
    if before.get("executor/requests", 0) > last["executor/requests"]:
        before = {}
    checks = last["executor/requests"] - before.get("executor/requests", 0)
    return (last.get(name, 0) - before.get(name, 0)) / checks if checks > 0 else 0.0


def _lasting(rows: Sequence[Row], name: str, steps: int, bad: Callable[[float], bool]) -> bool:
    """Whether each of the last `steps` rows that have the metric is bad, and there are that many."""
    values = [row[name] for row in rows if row.get(name) is not None][-steps:]
    return len(values) == steps and all(bad(value) for value in values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"
