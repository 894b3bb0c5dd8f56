"""`azr-jax report RUN_DIR`: one self-contained HTML file of a run, finished or under way.

Inline style and SVG, no script, nothing fetched. Whatever the model wrote is escaped and its control characters made
visible. Parts whose files or metrics are missing are left out.
"""

from __future__ import annotations

import html
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from azr_jax import __version__
from azr_jax.errors import UserError
from azr_jax.telemetry.alarms import alarms
from azr_jax.telemetry.charts import number, percent
from azr_jax.telemetry.curves import curves
from azr_jax.telemetry.metrics import KIND_NAMES
from azr_jax.telemetry.progress import MODES, SETS, Comparison, comparisons, duration
from azr_jax.telemetry.run_folder import ROLLOUT_NAME, read_rows

logger = logging.getLogger(__name__)

TEXT_CHARS = 6000  # of a model text shown
Rows = Sequence[Mapping[str, Any]]


def report_command(path: str) -> int:
    """The `report` command: writes RUN_DIR/report.html. Returns the exit code; raises UserError if there is no run."""
    logger.info("report: %s", write_report(Path(path)))
    return 0


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Raises: UserError if the folder holds no run or cannot be written.
    """
    run_dir = Path(run_dir).expanduser().absolute()
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise UserError(
            f"{run_dir} is no run folder (it has no config.yaml or metrics.jsonl). Name the run_dir of a run.",
            exit_code=2,
        )
    page = render(run_dir).encode("utf-8", "backslashreplace")
    target = run_dir / "report.html"
    temporary = target.with_name("report.html.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}. Free space or fix its permissions.") from error
    return target


def render(run_dir: Path) -> str:
    """The page as text."""
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    config_text = _read_text(run_dir / "config.yaml")
    fresh = _fresh_outcome(run_dir / "outcome.json")
    outcome = fresh or comparisons(rows)
    body = [
        _header(run_dir, config_text, rows),
        _alarm_box(rows),
        _tiles(rows, outcome),
        _outcome_table(outcome, bool(fresh)),
        curves(rows),
        _task_samples(run_dir / "tasks.jsonl"),
        _rollout_samples(run_dir / "rollouts"),
        _configuration(config_text, list(read_rows(run_dir / "config_changes.jsonl"))),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>azr_jax: {escape(run_dir.name)}</title><style>{style}</style></head><body><main>"
        f"{''.join(body)}<footer>azr_jax {__version__}. Metric names are explained in docs/metrics.md.</footer>"
        "</main></body></html>\n"
    )


def escape(text: Any) -> str:
    """HTML text from anything. Control and direction-changing characters become visible; long texts are cut."""
    text = str(text)
    if len(text) > TEXT_CHARS:
        text = f"{text[:TEXT_CHARS]}\n... {len(text) - TEXT_CHARS} more characters"
    shown = []
    for character in text:
        code = ord(character)
        if code < 32 and character not in "\n\t":
            shown.append(chr(0x2400 + code))
        elif 0x7F <= code < 0xA0 or 0x200B <= code <= 0x200F or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(character)
    return html.escape("".join(shown), quote=True)


def _header(run_dir: Path, config_text: str, rows: Rows) -> str:
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError:
        config = {}
    config = config if isinstance(config, dict) else {}
    done, total = rows[-1]["step"] if rows else 0, config.get("steps")
    finished = isinstance(total, int) and done >= total
    seconds = sum(row.get("time/step") or 0.0 for row in rows)
    facts = [
        ("steps", f"{done} of {total}" if total is not None else done),
        ("state", "finished" if finished else "under way, or stopped before its end"),
        ("time", duration(seconds)),
        *((key, config[key]) for key in ("model", "preset", "seed") if key in config),
        *((("control", config["control"]),) if config.get("control", "none") != "none" else ()),
    ]
    listed = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts)
    return f'<h1>Self-play: {escape(run_dir.name)}</h1><div class="facts">{listed}</div>'


def _alarm_box(rows: Rows) -> str:
    found = alarms(rows)
    if not found:
        return ""
    listed = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="alarms"><b>Look at this</b><ul>{listed}</ul></div>'


def _tiles(rows: Rows, outcome: Sequence[Comparison]) -> str:
    tiles = []
    for line in outcome:
        if line.set == "pooled":
            direction = "up" if line.difference > 0 else "down"
            interval = f", 95 % interval {_interval(line)}" if _interval(line) else ""
            tiles.append(
                f'<div class="tile"><span>held-out pass@1, {MODES[line.mode]}, all kinds</span>'
                f"<strong>{100 * line.before:.1f} &rarr; {100 * line.after:.1f} %</strong>"
                f'<span><b class="{direction}">{100 * line.difference:+.1f} points</b>{interval}</span></div>'
            )
    for title, prefix, show in (
        ("responses that think before answering", "solve/think_share", percent),
        ("tokens of a solver's response", "solve/length", number),
    ):
        ends = _ends(rows, prefix)
        if ends is not None:
            tiles.append(
                f'<div class="tile"><span>{title}</span><strong>{show(ends[0])} &rarr; {show(ends[1])}</strong>'
                "<span>mean over kinds, first and last steps</span></div>"
            )
    added = sum(row.get(f"buffer/new/{kind}") or 0 for row in rows for kind in KIND_NAMES)
    if added:
        tiles.append(
            f'<div class="tile"><span>tasks it made for itself</span><strong>{added:,.0f}</strong>'
            "<span>valid and stored</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _ends(rows: Rows, prefix: str) -> tuple[float, float] | None:
    """Mean over kinds at both ends of the run, over five steps each."""
    means = []
    for row in rows:
        values = [row[f"{prefix}/{kind}"] for kind in KIND_NAMES if row.get(f"{prefix}/{kind}") is not None]
        if values:
            means.append(sum(values) / len(values))
    if len(means) < 2:
        return None
    few = min(5, len(means) // 2)
    return sum(means[:few]) / few, sum(means[-few:]) / few


def _interval(line: Comparison) -> str:
    if line.low is None or line.high is None:
        return ""
    return f"{100 * line.low:+.1f} to {100 * line.high:+.1f}"


def _fresh_outcome(path: Path) -> list[Comparison]:
    """The table a finished run left; [] if there is none."""
    try:
        lines = [Comparison(**row) for row in json.loads(_read_text(path) or "[]")]
    except (ValueError, TypeError):
        logger.warning("%s is damaged, the report goes without it", path)
        return []
    return [line for line in lines if line.mode in MODES and line.set in SETS]


def _outcome_table(outcome: Sequence[Comparison], fresh: bool) -> str:
    if not outcome:
        return ""
    about = (
        "Fresh held-out tasks that nothing was chosen by: the weights before the first update and the last ones"
        if fresh
        else "The fixed held-out tasks: the first and the last evaluation of this run"
    )
    body, previous = [], ""
    for line in outcome:
        sign = "up" if (line.low or 0) > 0 else "down" if (line.high or 0) < 0 else ""
        classes = ("pooled " if line.set == "pooled" else "") + ("first" if line.mode != previous else "")
        previous = line.mode
        body.append(
            f'<tr class="{classes}"><td>{MODES[line.mode]}</td><td>{SETS[line.set]}</td>'
            f'<td class="n">{line.count or ""}</td><td class="n">{100 * line.before:.1f} %</td>'
            f'<td class="n">{100 * line.after:.1f} %</td><td class="n {sign}">{100 * line.difference:+.1f}</td>'
            f'<td class="n">{_interval(line)}</td></tr>'
        )
    return (
        f"<h2>Before and after</h2><p class='about'>pass@1. {about}; difference in points, with its 95 % interval "
        "(coloured where that excludes 0).</p>"
        "<div class='scroll'><table>"
        "<tr><th>decoding</th><th>tasks</th><th class='n'>N</th><th class='n'>before</th><th class='n'>after</th>"
        f"<th class='n'>difference</th><th class='n'>95 % interval</th></tr>{''.join(body)}</table></div>"
    )


def _task_samples(path: Path) -> str:
    steps = _first_middle_last({row["step"] for row in read_rows(path)})
    chosen: dict[tuple[int, str], dict[str, Any]] = {}
    for row in read_rows(path):
        if row["step"] in steps:
            chosen.setdefault((row["step"], str(row.get("kind"))), row)
    if not chosen:
        return ""
    articles: dict[int, list[str]] = {step: [] for step in steps}
    for (step, kind), row in chosen.items():
        rate = row.get("solve_rate")
        solved = f"solved {percent(rate)}" if isinstance(rate, int | float) else ""
        fields = [(name, row.get(name)) for name in ("program", "input", "output", "message")]
        pairs = row.get("pairs")
        if isinstance(pairs, list) and pairs:
            shown = "\n".join(f"{p[0]}  ->  {p[1]}" for p in pairs[:4] if isinstance(p, list) and len(p) == 2)
            fields.append((f"{len(pairs)} input/output pairs, the first of them", shown))
        articles[step].append(_article(kind, solved, fields))
    return "<h2>Tasks the model made</h2>" + _by_step(articles)


def _rollout_samples(folder: Path) -> str:
    """For three steps: of each role and kind, a response with the most and one with the least reward."""
    files = {}
    if folder.is_dir():
        matches = ((ROLLOUT_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
        files = {int(match.group(1)): entry for match, entry in matches if match}
    articles: dict[int, list[str]] = {}
    for step in _first_middle_last(files):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in read_rows(files[step]):
            groups.setdefault((str(row.get("role", "")), str(row.get("kind", ""))), []).append(row)
        articles[step] = []
        for (role, kind), group in sorted(groups.items()):
            ordered = sorted(group, key=_reward)
            best, worst = ordered[-1], ordered[0]
            for shown in (best, worst) if _reward(best) > _reward(worst) else (best,):
                reward = f"reward {_reward(shown):+.2f}" if shown.get("reward") is not None else ""
                fields = [(name, shown.get(name)) for name in ("prompt", "response", "verdict")]
                articles[step].append(_article(f"{role} {kind}".strip(), reward, fields))
    return "<h2>Responses</h2>" + _by_step(articles) if any(articles.values()) else ""


def _reward(row: Mapping[str, Any]) -> float:
    value = row.get("reward")
    return float(value) if isinstance(value, int | float) else 0.0


def _first_middle_last(steps: Iterable[int]) -> list[int]:
    ordered = sorted(steps)
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]}) if ordered else []


def _article(title: str, note: str, fields: Iterable[tuple[str, Any]]) -> str:
    shown = "".join(
        f"<label>{escape(name)}</label><pre>{escape(value if isinstance(value, str) else json.dumps(value))}</pre>"
        for name, value in fields
        if value not in (None, "", [])
    )
    header = f"<header><h4>{escape(title)}</h4><span class='soft'>{escape(note)}</span></header>"
    return f"<article>{header}{shown}</article>"


def _by_step(articles: Mapping[int, Sequence[str]]) -> str:
    """One fold for each step, the last one open."""
    last = max((step for step, shown in articles.items() if shown), default=None)
    return "".join(
        f"<details{' open' if step == last else ''}><summary>step {step}</summary>"
        f'<div class="samples">{"".join(shown)}</div></details>'
        for step, shown in articles.items()
        if shown
    )


def _configuration(text: str, changes: Rows) -> str:
    if not text:
        return ""
    lines = []
    for record in changes:
        pairs = record.get("changes")
        if isinstance(pairs, dict):
            listed = ", ".join(f"{key}: {pair.get('old')} to {pair.get('new')}" for key, pair in pairs.items())
            lines.append(f"<li>after step {record['step']}: {escape(listed)}</li>")
    changed = f"<p>Changed under way:</p><ul>{''.join(lines)}</ul>" if lines else ""
    fold = f"<details><summary>config.yaml</summary><pre class='tall'>{escape(text)}</pre></details>"
    return f"<h2>Configuration</h2>{changed}{fold}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
