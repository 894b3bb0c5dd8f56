"""Evaluation around training: the fixed held-out set every few steps, and fresh tasks once, before against after.

The fixed set gives the curve and is looked at many times; the claim at the end is made on fresh tasks that nothing was
chosen by. Both are paired: the same tasks, prompts and random keys for every set of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from azr_jax.evals.heldout import SPLITS, Outcome, held_out_tasks
from azr_jax.evals.intervals import Estimate, paired_difference
from azr_jax.tasks.kinds import KINDS, Kind, Task
from azr_jax.telemetry.progress import Comparison

#: Seeds of the sets. The fixed one is the same in every run; fresh ones are the run's own.
FIXED_SEED, FRESH_SEED = 0, 1_000_000
MODES = {"sampled": 1.0, "greedy": 0.0}  # mode -> temperature

#: (tasks, temperature) -> what the current weights do on them.
Evaluate = Callable[[list[Task], float], Outcome]


def _sets(split: str) -> list[tuple[str, Kind | None]]:
    """(name of the set, its kind) for a split: every kind and all pooled, or the split as a whole."""
    if split != "standard":
        return [(split, None)]
    return [*((kind.value, kind) for kind in KINDS), ("pooled", None)]


class FixedEvaluation:
    """The fixed set; remembers the first outcomes, so that later ones are reported as paired gains.

    per_kind tasks of each kind; of the out-of-distribution splits a quarter as many of each of their two kinds.
    """

    def __init__(self, per_kind: int) -> None:
        sizes = {"standard": per_kind, "longer": -(-per_kind // 4), "bigger": -(-per_kind // 4)}
        self.tasks = {split: held_out_tasks(split, sizes[split], FIXED_SEED) for split in SPLITS}
        self.baseline: dict[str, list[bool]] = {}

    def take_baseline(self, baseline: dict[str, list[bool]]) -> bool:
        """Take over first outcomes from a checkpoint; False, and none taken, if they are not of these very sets."""
        sizes = {f"{split}/{mode}": len(tasks) for split, tasks in self.tasks.items() for mode in MODES}
        fits = {name: len(outcomes) for name, outcomes in baseline.items()} == sizes
        self.baseline = baseline if fits else {}
        return fits

    def measure(self, evaluate: Evaluate) -> dict[str, float]:
        """eval/ metrics of the current weights."""
        row: dict[str, float] = {}
        for split, tasks in self.tasks.items():
            for mode, temperature in MODES.items():
                outcome = evaluate(tasks, temperature)
                first = self.baseline.setdefault(f"{split}/{mode}", list(outcome.correct))
                for name, kind in _sets(split):
                    _put(row, f"eval/{mode}/{name}", outcome.accuracy(kind))
                    gain = paired_difference(outcome.of(kind, first), outcome.of(kind, outcome.correct))
                    _put(row, f"eval/gain/{mode}/{name}", gain)
                    row[f"eval/count/{name}"] = float(gain.n)
                if split == "standard":
                    thinks = [t for k in (Kind.DEDUCTION, Kind.ABDUCTION) for t in outcome.of(k, outcome.thinks)]
                    row[f"eval/think_share/{mode}"] = sum(thinks) / len(thinks)
                    row[f"eval/length/{mode}"] = outcome.mean_length()
        return row


def _put(row: dict[str, float], name: str, estimate: Estimate) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate.value, estimate.low, estimate.high


def fresh_comparison(before: Evaluate, after: Evaluate, per_kind: int, seed: int) -> list[Comparison]:
    """Two sets of weights on tasks drawn anew: by kind and pooled, longer programs, bigger values.

    The out-of-distribution splits have half as many tasks of each of their two kinds.
    """
    lines = []
    for split in SPLITS:
        tasks = held_out_tasks(split, per_kind if split == "standard" else -(-per_kind // 2), FRESH_SEED + seed)
        for mode, temperature in MODES.items():
            old, new = before(tasks, temperature), after(tasks, temperature)
            for name, kind in _sets(split):
                gain = new.gain_over(old, kind)
                a, b = old.accuracy(kind).value, new.accuracy(kind).value
                lines.append(Comparison(mode, name, a, b, gain.value, gain.low, gain.high, gain.n))
    return sorted(lines, key=lambda line: list(MODES).index(line.mode))


def to_json(lines: list[Comparison]) -> list[dict[str, Any]]:
    """The comparison as JSON-able rows."""
    return [asdict(line) for line in lines]
