"""One compact line a step for the terminal, and the table of a run's outcome. Text only: the caller logs it.

Lines are never rewritten, so the same output serves a terminal, a file and a batch system's log.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from azr_jax.telemetry.metrics import KIND_NAMES

SETS = {
    "deduction": "deduction",
    "abduction": "abduction",
    "induction": "induction",
    "pooled": "all kinds",
    "longer": "longer programs",
    "bigger": "bigger values",
}
MODES = {"sampled": "sampled", "greedy": "greedy"}


#: What the figures of a step's line mean; shown once, before the first.
LEGEND = (
    "a line a step: share of deduction/abduction/induction tasks solved | share of proposals that are valid, programs "
    "new to the buffers | share of tasks some but not all samples solve | share of answers that think first, their "
    "mean length in tokens | mean reward of proposer (P) and solver (S)"
)


class Progress:
    """Renders steps; the time to the end is estimated from the median of the last ten steps, compiling left out."""

    def __init__(self, total: int) -> None:
        """total: steps of the whole run."""
        self.total = total
        self._seconds: deque[float] = deque(maxlen=10)

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """A line of about 150 characters; metrics that are absent are left out. Solve shares are in the order of kinds.

        step   7/120 | solved 41/38/5 % | valid 87 % new 44 | between 31 % | think 35 % len 12 | reward P +0.21 S -0.10
        | 2.9 s | ETA 5:28    (on the same line)
        """
        width = len(str(self.total))
        parts = [f"step {step:>{width}}/{self.total}"]
        solved = _by_kind(metrics, "solve/accuracy")
        if any(value is not None for value in solved):
            parts.append("solved " + "/".join(_share(value) for value in solved) + " %")
        parts.append(_join(("valid", _percent(_mean(metrics, "propose/valid"))), ("new", _new_programs(metrics))))
        parts.append(_join(("between", _percent(metrics.get("propose/rate_between")))))
        length = _mean(metrics, "solve/length")
        parts.append(
            _join(
                ("think", _percent(_mean(metrics, "solve/think_share"))),
                ("len", None if length is None else f"{length:.0f}"),
            )
        )
        rewards = _join(
            ("P", _signed(_mean(metrics, "reward/propose"))), ("S", _signed(_mean(metrics, "reward/solve")))
        )
        parts.append(f"reward {rewards}" if rewards else "")
        seconds = metrics.get("time/step")
        if seconds is not None:
            self._seconds.append(max(0.0, seconds - (metrics.get("time/compile") or 0.0)))
            parts.append(f"{seconds:.1f} s")
            if step < self.total:
                parts.append(f"ETA {duration((self.total - step) * statistics.median(self._seconds))}")
        return " | ".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """One line of the outcome: accuracies as shares, and the 95 % interval of the difference, if known."""

    mode: str  # key of MODES
    set: str  # key of SETS
    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    count: int = 0  # items, 0 if not known


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """First against last evaluation in the rows of metrics.jsonl, where both have the figure; [] with fewer than two.

    The paired interval (eval/gain/...) is used where recorded; else the intervals of the two accuracies are combined as
    if independent, which is wider.
    """
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if len(evaluated) < 2:
        return []
    first, last = evaluated[0], evaluated[-1]
    found = []
    for mode in MODES:
        for name in SETS:
            before, after = first.get(f"eval/{mode}/{name}"), last.get(f"eval/{mode}/{name}")
            if before is None or after is None:
                continue
            low, high = last.get(f"eval/gain/{mode}/{name}_low"), last.get(f"eval/gain/{mode}/{name}_high")
            halves = [_half_width(row, f"eval/{mode}/{name}") for row in (first, last)]
            if (low is None or high is None) and None not in halves:
                half = math.hypot(*(half for half in halves if half is not None))
                low, high = after - before - half, after - before + half
            count = int(last.get(f"eval/count/{name}") or 0)
            found.append(Comparison(mode, name, before, after, after - before, low, high, count))
    return found


def before_after_table(lines: Sequence[Comparison]) -> str:
    """The outcome as aligned text, percentages with one decimal, differences in points; "" without lines."""
    if not lines:
        return ""
    table = [("held-out pass@1", "tasks", "", "before", "after", "difference", "95 % interval")]
    for line in lines:
        table.append(
            (
                MODES.get(line.mode, line.mode),
                SETS.get(line.set, line.set),
                f"N={line.count}" if line.count else "",
                f"{100 * line.before:.1f} %",
                f"{100 * line.after:.1f} %",
                f"{100 * line.difference:+.1f}",
                "" if line.low is None or line.high is None else f"[{100 * line.low:+.1f}, {100 * line.high:+.1f}]",
            )
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rendered = []
    for index, row in enumerate(table):
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        rendered.append(f"{left}  {right}".rstrip())
        if index == 0:
            rendered.append("-" * len(rendered[0]))
        elif index + 1 < len(table) and table[index + 1][0] != row[0]:
            rendered.append("")
    return "\n".join(rendered)


def duration(seconds: float) -> str:
    """4:07 (minutes and seconds) or 2:03:10 or 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _half_width(row: Mapping[str, Any], name: str) -> float | None:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return (high - low) / 2 if low is not None and high is not None else None


def _by_kind(metrics: Mapping[str, Any], prefix: str) -> list[float | None]:
    return [metrics.get(f"{prefix}/{kind}") for kind in KIND_NAMES]


def _mean(metrics: Mapping[str, Any], prefix: str) -> float | None:
    values = [value for value in _by_kind(metrics, prefix) if value is not None]
    return sum(values) / len(values) if values else None


def _new_programs(metrics: Mapping[str, Any]) -> str | None:
    value = metrics.get("propose/new_programs", metrics.get("propose/unique_programs"))
    return None if value is None else f"{value:.0f}"


def _join(*pairs: tuple[str, str | None]) -> str:
    return " ".join(f"{name} {value}" for name, value in pairs if value is not None)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"
