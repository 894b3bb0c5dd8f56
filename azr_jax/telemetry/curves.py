"""Which curves the report shows, and where they come from. The captions are the glossary's own definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from azr_jax.telemetry.charts import Format, Series, line_chart, number, percent
from azr_jax.telemetry.metrics import CHOICES, GLOSSARY, KIND_NAMES
from azr_jax.telemetry.progress import MODES, SETS

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A chart of the report: curves are (label, metric) pairs; the caption defaults to the glossary's definition."""

    section: str
    title: str
    curves: tuple[tuple[str, str], ...]
    show: Format
    caption: str = ""
    floor: float | None = 0.0


def _each(name: str, values: Iterable[str] = KIND_NAMES) -> tuple[tuple[str, str], ...]:
    """One curve for each value, put into the `{}` of the metric's name."""
    return tuple((SETS.get(value, value), name.format(value)) for value in values)


_EVAL_CAPTION = "Same held-out tasks at every evaluation; shaded: 95 % interval."
_SPLITS = (*KIND_NAMES, "pooled")
CHARTS = (
    Chart("Held-out tasks", "pass@1, sampled", _each("eval/sampled/{}", _SPLITS), percent, _EVAL_CAPTION, None),
    Chart("Held-out tasks", "pass@1, greedy", _each("eval/greedy/{}", _SPLITS), percent, _EVAL_CAPTION, None),
    Chart("Held-out tasks", "Harder, sampled", _each("eval/sampled/{}", ("longer", "bigger")), percent, _EVAL_CAPTION),
    Chart("Held-out tasks", "Thinking on held-out tasks", _each("eval/think_share/{}", MODES), percent),
    Chart("Reward", "Reward of the solver", _each("reward/solve/{}"), number),
    Chart("Reward", "Reward of the proposer", _each("reward/propose/{}"), number),
    Chart("Solver", "Accuracy on the step's own tasks", _each("solve/accuracy/{}"), percent),
    Chart("Solver", "Share of thinking", _each("solve/think_share/{}"), percent),
    Chart("Solver", "Response length, tokens", _each("solve/length/{}"), number),
    Chart("Solver", "Unreadable answers", _each("solve/format_error/{}"), percent),
    Chart("Proposer", "Valid proposals", _each("propose/valid/{}"), percent),
    Chart("Proposer", "Duplicates", _each("propose/duplicate/{}"), percent),
    Chart("Proposer", "Solve rates strictly between 0 and 1", _each("propose/rate_between/{}"), percent),
    Chart(
        "Proposer",
        "Distinct programs a step",
        (("distinct in the step", "propose/unique_programs"), ("never seen before", "propose/new_programs")),
        number,
    ),
    Chart("Proposer", "Success rate of learnability samples", _each("propose/solve_rate/{}"), percent),
    Chart("Proposer", "Statements in a program", _each("propose/statements/{}"), number),
    Chart("Learner", "Entropy, nats a token", _each("learner/entropy_{}", CHOICES["role"]), number),
    Chart("Learner", "Gradient norm", (("gradient norm", "learner/grad_norm"),), number),
    Chart("Learner", "Probability ratio, learner to sampler", (("mean", "learner/ratio_mean"),), number, floor=None),
    Chart(
        "Learner",
        "Difference of log-probabilities, sampler and learner",
        (("mean", "learner/logp_gap_mean"), ("largest", "learner/logp_gap_max")),
        number,
    ),
    Chart("Learner", "Learning rate", (("learning rate", "learner/lr"),), number),
    Chart("Time", "Seconds a phase", _each("time/{}", [p for p in CHOICES["phase"] if p != "step"]), number),
    Chart("Time", "Tokens a second, generating", (("tokens/s", "perf/tokens_per_second"),), number),
    Chart("Time", "Memory of the trainer, MiB", (("resident", "perf/rss_mb"),), number),
)


def curves(rows: Rows) -> str:
    """All charts that have data, under the headings of their sections, as HTML."""
    sections: dict[str, list[str]] = {}
    for chart in CHARTS:
        series = [
            Series(label, 4 if name.endswith("/pooled") else 1 + index % 6, _points(rows, name), _band(rows, name))
            for index, (label, name) in enumerate(chart.curves)
        ]
        caption = chart.caption or _definition(chart.curves[0][1])
        drawn = line_chart(chart.title, caption, series, chart.show, chart.floor)
        if drawn:
            sections.setdefault(chart.section, []).append(drawn)
    return "".join(
        f'<h2>{section}</h2><div class="charts">{"".join(charts)}</div>' for section, charts in sections.items()
    )


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _band(rows: Rows, name: str) -> list[tuple[float, float, float]]:
    bounds = [(row["step"], row.get(f"{name}_low"), row.get(f"{name}_high")) for row in rows]
    return [(step, low, high) for step, low, high in bounds if low is not None and high is not None]


def _definition(name: str) -> str:
    """The glossary's words on a metric, as a sentence."""
    group, _, rest = name.partition("/")
    for pattern, text in GLOSSARY[group][1].items():
        choices = [pattern]
        for choice, values in CHOICES.items():
            choices = [one.replace(f"{{{choice}}}", value) for one in choices for value in values]
        if rest in choices:
            return f"{text[0].upper()}{text[1:]}."
    return ""
