"""Glossary and its page, alarms, the progress line and the table of the outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from azr_jax.telemetry.alarms import alarms
from azr_jax.telemetry.metrics import GLOSSARY, KIND_NAMES, MEASURED, markdown, repeatable, unknown_names
from azr_jax.telemetry.progress import Comparison, Progress, before_after_table, comparisons, duration

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_glossary_says():
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == markdown(), "run: python -m azr_jax.telemetry.metrics > docs/metrics.md"


def test_groups_are_those_of_the_contract():
    assert list(GLOSSARY) == "reward solve propose buffer learner sampler time perf executor oversight eval".split()
    for _, names in GLOSSARY.values():
        for text in names.values():
            assert text and not text.endswith(".") and "|" not in text


def test_unknown_names():
    known = [
        "step", "reward/solve/deduction", "propose/rate_between", "propose/rate_between/induction", "time/update",
        "propose/reject/syntax_error", "executor/runs_per_second", "eval/greedy/pooled_low", "learner/entropy_solve",
        "eval/gain/sampled/longer_high", "eval/think_share/greedy", "oversight/flags/intent",
    ]  # fmt: skip
    assert unknown_names(known) == []
    wrong = ["reward/solve/deductoin", "loss", "learner/loss2", "reward/solve", "propose/reject/", "eval/beam/pooled"]
    assert unknown_names(dict.fromkeys([*known, *wrong], 0.0)) == wrong


HEALTHY = {
    "propose/rate_between": 0.4,
    "learner/logp_gap_mean": 1e-6,
    **{f"propose/accepted/{kind}": 0.6 for kind in KIND_NAMES},
    **{f"propose/duplicate/{kind}": 0.2 for kind in KIND_NAMES},
    **{f"buffer/new/{kind}": 12 for kind in KIND_NAMES},
}


def rows(count: int, **changed: object) -> list[dict]:
    return [{"step": step, **HEALTHY, **changed} for step in range(1, count + 1)]


def test_a_healthy_run_and_an_empty_one_raise_no_alarm():
    assert alarms([]) == [] and alarms(rows(50)) == [] and alarms([{"step": 1}] * 50) == []


@pytest.mark.parametrize(
    ("name", "value", "steps", "word"),
    [
        ("propose/rate_between", 0.03, 5, "solve rate between 0 and 1"),
        ("propose/accepted/induction", 0.05, 20, "induction: fewer than 10 %"),
        ("propose/duplicate/abduction", 0.6, 5, "abduction: 60 %"),
        ("buffer/new/deduction", 0, 10, "deduction: no new task"),
        ("learner/logp_gap_mean", 0.2, 5, "not on-policy"),
        ("learner/skipped", 1.0, 1, "was skipped"),
    ],
)
def test_each_alarm_comes_when_it_has_lasted_and_goes_when_it_has_passed(name, value, steps, word):
    bad = rows(steps, **{name: value})
    found = alarms(bad)
    assert len(found) == 1 and word in found[0]
    if steps > 1:
        assert alarms(bad[1:]) == []
    assert alarms(bad + rows(20)) == []
    assert alarms([*bad, {"step": 99, name: None}]) == found or steps == 1


def test_executor_alarms_look_at_the_last_steps_of_counters_that_a_resume_restarts():
    def counters(requests: int, timeouts: int, infra: int = 0) -> dict:
        names = ("requests", "status_timeout", "status_infra")
        return {f"executor/{name}": value for name, value in zip(names, (requests, timeouts, infra), strict=True)}

    quiet = [counters(1000 * step, step) for step in range(1, 9)]
    assert alarms(quiet) == []
    (found,) = alarms([*quiet, counters(9000, 508)])
    assert "10 % of checks hit the time limit" in found  # 505 of the last 5000
    assert alarms([*quiet, counters(9000, 508), *(counters(9000 + 1000 * n, 508) for n in range(1, 6))]) == []
    (found,) = alarms([*quiet, counters(100, 0, infra=4)])
    assert "4.0 % of checks were lost" in found  # after a resume the counters are the step's own
    assert alarms([{"step": 1, "executor/requests": 100}]) == []


def test_progress_line():
    metrics = {
        "solve/accuracy/deduction": 0.412, "solve/accuracy/induction": 0.05,
        "propose/valid/deduction": 0.9, "propose/valid/abduction": 0.8, "propose/new_programs": 44,
        "propose/rate_between": 0.31, "solve/think_share/deduction": 0.35, "solve/length/deduction": 12.4,
        "reward/propose/deduction": 0.21, "reward/solve/deduction": -0.1, "time/step": 2.94,
    }  # fmt: skip
    line = Progress(total=120).line(7, metrics)
    assert line == (
        "step   7/120 | solved 41/-/5 % | valid 85 % new 44 | between 31 % | think 35 % len 12 | "
        "reward P +0.21 S -0.10 | 2.9 s | ETA 5:32"
    )
    assert Progress(total=9).line(9, {}) == "step 9/9"
    assert "ETA" not in Progress(total=9).line(9, metrics)
    assert Progress(total=9).line(1, {"solve/accuracy/deduction": None, "time/step": None}) == "step 1/9"


def test_eta_does_not_follow_one_slow_step():
    progress = Progress(total=100)
    for step in range(1, 10):
        progress.line(step, {"time/step": 2.0})
    assert progress.line(10, {"time/step": 500.0}).endswith("ETA 3:00")
    first = Progress(total=11).line(1, {"time/step": 62.0, "time/compile": 60.0})
    assert first.endswith("62.0 s | ETA 0:20"), "no step after the first compiles"


def test_durations():
    assert [duration(seconds) for seconds in (0.2, 247, 7390, 400000)] == ["0:00", "4:07", "2:03:10", "4 d 15 h"]


def test_outcome_takes_the_paired_interval_or_else_combines_both():
    first = {"step": 0, "eval/greedy/pooled": 0.30, "eval/greedy/pooled_low": 0.27, "eval/greedy/pooled_high": 0.33}
    last = {"step": 9, "eval/greedy/pooled": 0.40, "eval/greedy/pooled_low": 0.36, "eval/greedy/pooled_high": 0.44}
    middle = {"step": 5, "learner/loss": 1.0}
    (line,) = comparisons([first, middle, last])
    assert (line.mode, line.set, line.before, line.after) == ("greedy", "pooled", 0.30, 0.40)
    assert line.difference == pytest.approx(0.10)
    assert (line.low, line.high) == (pytest.approx(0.05), pytest.approx(0.15))  # hypot(0.03, 0.04) around 0.10
    paired = last | {"eval/gain/greedy/pooled_low": 0.08, "eval/gain/greedy/pooled_high": 0.12}
    paired["eval/count/pooled"] = 1500
    (line,) = comparisons([first, paired])
    assert (line.low, line.high, line.count) == (0.08, 0.12, 1500)
    assert comparisons([first]) == [] and comparisons([]) == []
    (line,) = comparisons([{"step": 0, "eval/greedy/pooled": 0.3}, {"step": 1, "eval/greedy/pooled": 0.4}])
    assert line.low is None and "[" not in before_after_table([line])


def test_table():
    table = before_after_table(
        [
            Comparison("sampled", "deduction", 0.351, 0.514, 0.163, 0.14, 0.186, 800),
            Comparison("sampled", "pooled", 0.24, 0.334, 0.094, 0.075, 0.113, 2400),
            Comparison("greedy", "pooled", 0.4, 0.38, -0.02, -0.04, 0.0),
        ]
    )
    lines = table.splitlines()
    assert lines[2].split() == "sampled deduction N=800 35.1 % 51.4 % +16.3 [+14.0, +18.6]".split()
    assert "-2.0" in lines[-1] and lines[4] == ""
    assert len({len(line) for line in (lines[0], lines[2], lines[3], lines[5])}) == 1
    assert before_after_table([]) == ""


def test_what_was_measured_is_told_from_what_repeats():
    row = {"step": 3, "time/step": 1.0, "perf/rss_mb": 5, "executor/p50_ms": 2, "learner/loss": 0.5, "eval/count/x": 1}
    assert repeatable(row) == {"step": 3, "learner/loss": 0.5, "eval/count/x": 1}
    assert set(MEASURED) < set(GLOSSARY)
