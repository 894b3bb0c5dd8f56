"""The report: self-contained, escaped, and patient with runs that are young, torn or half missing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_jax.errors import UserError
from azr_jax.telemetry.charts import HEIGHT, WIDTH, Series, line_chart, number, percent
from azr_jax.telemetry.curves import CHARTS
from azr_jax.telemetry.metrics import KIND_NAMES, unknown_names
from azr_jax.telemetry.progress import Comparison
from azr_jax.telemetry.report import escape, report_command, write_report
from azr_jax.telemetry.run_folder import RunFolder

EVIL = "</pre><script>alert(1)</script>&amp;\x00\x1b[31m\ud800\u202e\u200b'\""
VOID = {"meta", "br", "path", "circle"}


class Checker(HTMLParser):
    """Fails on tags that do not nest; collects tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        risky = ("href", "src", "action", "style")
        self.addresses += [value for name, value in attrs if name in risky or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data):
        self.text += data


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags and checker.addresses == []
    return checker


def fake_run(path: Path, steps: int) -> RunFolder:
    folder = RunFolder.open(path, f"run_dir: x\nsteps: {steps}\nmodel: <b>evil</b>\npreset: fixed\n")
    for step in range(1, steps + 1):
        row = {name: 0.5 + step / 100 for chart in CHARTS for _, name in chart.curves if not name.startswith("eval/")}
        row |= {f"buffer/new/{kind}": 3 for kind in KIND_NAMES} | {"time/step": 1.0, "propose/rate_between": 0.01}
        if step in (1, steps):
            for mode in ("greedy", "sampled"):
                for name in (*KIND_NAMES, "pooled", "longer"):
                    value = 0.3 + 0.1 * (step > 1)
                    row |= {f"eval/{mode}/{name}": value, f"eval/{mode}/{name}_low": value - 0.02}
                    row |= {f"eval/{mode}/{name}_high": value + 0.02}
        assert unknown_names(row) == []
        folder.append_metrics(step, row)
        folder.append_tasks(step, [{"kind": kind, "program": f"# {EVIL}", "solve_rate": 0.5} for kind in KIND_NAMES])
        folder.write_rollouts(
            step,
            [
                {"role": role, "kind": kind, "prompt": EVIL, "response": f"step {step} {reward}", "reward": reward,
                 "verdict": {"status": EVIL}}
                for role in ("propose", "solve") for kind in KIND_NAMES for reward in (0.25, 1.0, -0.5)
            ],
        )  # fmt: skip
    return folder


def test_a_whole_run(tmp_path):
    fake_run(tmp_path / "run", 60).close()
    page = check(write_report(tmp_path / "run"))
    assert {"svg", "table", "article", "style"} <= page.tags
    assert "60 of 60" in page.text and "finished" in page.text and "<b>evil</b>" in page.text
    assert "+10.0" in page.text and "Look at this" in page.text
    assert all(chart.title in page.text for chart in CHARTS if "bigger" not in chart.curves[0][1]
               and chart.title != "Thinking on held-out tasks")  # fmt: skip
    assert "</pre><script>alert(1)</script>&amp;\u2400\u241b[31m\\ud800\\u202e\\u200b'\"" in page.text
    for step in (1, 31, 60):
        assert f"step {step} 1.0" in page.text and f"step {step} -0.5" in page.text
        assert f"step {step} 0.25" not in page.text, "only the best and the worst of each role and kind"
    source = (tmp_path / "run/report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", source, re.S):
        ElementTree.fromstring(svg)
    assert "http" not in source


def test_the_outcome_of_a_finished_run_is_the_headline(tmp_path):
    folder = fake_run(tmp_path, 2)
    lines = [Comparison("greedy", "pooled", 0.311, 0.444, 0.133, 0.11, 0.156, 2400), Comparison("x", "y", 0, 0, 0)]
    folder.write_outcome([asdict(line) for line in lines])
    text = check(write_report(tmp_path)).text
    assert "31.1 \u2192 44.4 %" in text and "Fresh held-out tasks" in text and "+11.0 to +15.6" in text
    folder.begin_after(2)
    assert not folder.outcome.exists(), "the run goes on"
    folder.outcome.write_text("[{]")
    assert "30.0 \u2192 40.0 %" in check(write_report(tmp_path)).text
    folder.close()


def test_a_run_under_way_with_torn_lines(tmp_path):
    folder = fake_run(tmp_path, 3)
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 4, "tor')
    (folder.rollouts / "step_000003.jsonl").write_text("garbage\n[1]\n")
    (tmp_path / "config.yaml").write_text("steps: 100")
    page = check(write_report(tmp_path))  # while the run holds its lock
    assert "3 of 100" in page.text and "under way" in page.text
    folder.close()


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "tasks.jsonl", "rollouts"])
def test_missing_files_are_left_out(tmp_path, missing):
    fake_run(tmp_path, 2).close()
    gone = tmp_path / missing
    if gone.is_dir():
        for entry in gone.iterdir():
            entry.unlink()
        gone.rmdir()
    else:
        gone.unlink()
    check(write_report(tmp_path))


def test_a_run_that_has_not_finished_a_step(tmp_path):
    RunFolder.open(tmp_path, "steps: 5\n").close()
    assert report_command(str(tmp_path)) == 0
    assert "0 of 5" in check(tmp_path / "report.html").text


def test_odd_content_is_survived(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff: [")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "learner/loss": null, "eval/greedy/pooled": null}\n[]\n3\n')
    (tmp_path / "tasks.jsonl").write_text('{"step": 1, "kind": null, "pairs": [1, [2]], "solve_rate": "x"}\n')
    check(write_report(tmp_path))


def test_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no run folder"):
            write_report(path)
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut():
    assert len(escape("a" * 100_000)) < 7000 and "94000 more characters" in escape("a" * 100_000)


finite = st.floats(-1e30, 1e30, allow_nan=False)


@given(st.lists(st.tuples(st.integers(0, 10**6), finite), min_size=1, max_size=60), st.booleans())
@settings(max_examples=150)
def test_curves_stay_inside_the_picture(points, banded):
    points = sorted(dict(points).items())
    band = [(step, value - abs(value), value + 1) for step, value in points] if banded else ()
    svg = line_chart("t", "c", [Series("a", 1, points, band)], number)
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", svg, re.S).group(0))
    for node in root.iter():
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", node.get("d", "").partition("H")[0]):
            assert -0.1 <= float(x) <= WIDTH + 0.1 and -0.1 <= float(y) <= HEIGHT + 0.1


def test_ticks_differ_and_long_curves_are_thinned():
    svg = line_chart("t", "c", [Series("a", 1, [(s, 1 + 1e-6 * (s % 7)) for s in range(10_000)])], number)
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(set(labels)) == len(labels) >= 3
    assert len(svg) < 20_000
    assert line_chart("t", "c", [Series("a", 1, [])], percent) == ""
    assert (percent(0.412), number(0.5), number(12345.0), number(2.5e6), number(2e-4)) == (
        "41 %", "0.5", "12.3k", "2.5M", "2.0e-04")  # fmt: skip
