"""Line charts as inline SVG, with colours from the page's style sheet. No plotting library, no script.

What this does not do: anything but curves over steps.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 8, 26
MOST_POINTS = 400  # of a drawn curve; longer ones are averaged over neighbouring steps
SMOOTH_FROM = 40  # points from which a curve without intervals is drawn smoothed over its raw self


class Format(Protocol):
    """Text of a value; `extra` asks for that many more digits than usual."""

    def __call__(self, value: float, extra: int = 0) -> str: ...


@dataclass(frozen=True)
class Series:
    """One curve. points: (step, value), ascending; band: (step, low, high), drawn behind it; colour: 1..6."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = field(default=())


def percent(value: float, extra: int = 0) -> str:
    """0.412 -> 41 %"""
    return f"{100 * value:.{extra}f} %"


def number(value: float, extra: int = 0) -> str:
    """Three significant digits at most, thousands as k and M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.{3 + extra}g}M"
    if size >= 1e4:
        return f"{value / 1e3:.{3 + extra}g}k"
    return f"{value:.{1 + extra}e}" if 0 < size < 1e-3 else f"{value:.{3 + extra}g}"


def line_chart(title: str, caption: str, series: Sequence[Series], show: Format, floor: float | None = None) -> str:
    """A <figure>: title, legend with each curve's last value, axes, curves, caption. "" if there is nothing to draw.

    floor: a value that the vertical axis must include (0 for shares and counts).
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    steps = [step for one in series for step, _ in one.points]
    values = [value for one in series for _, value in one.points]
    values += [bound for one in series for _, low, high in one.band for bound in (low, high)]
    if floor is not None:
        values.append(floor)
    ticks = _ticks(min(values), max(values), 4)
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = []
    for tick, label in zip(ticks, _labels(ticks, show), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(first, last, 6) if last > first else [first]:
        if first <= tick <= last and tick == int(tick):
            parts.append(
                f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(tick)}</text>'
            )
    for one in series:
        if len(one.band) > 1:
            upper = [f"{x(step):.1f} {y(top):.1f}" for step, _, top in one.band]
            lower = [f"{x(step):.1f} {y(bottom):.1f}" for step, bottom, _ in reversed(one.band)]
            parts.append(f'<path class="band f{one.colour}" d="M{"L".join(upper + lower)}Z"/>')
    for one in series:
        points = _thinned(one.points)
        smooth = len(points) >= SMOOTH_FROM and not one.band
        if smooth:
            parts.append(_curve(points, x, y, f"raw s{one.colour}"))
        parts.append(_curve(_smoothed(points) if smooth else points, x, y, f"line s{one.colour}"))
        if len(points) <= 30:
            parts += [
                f'<circle class="f{one.colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6">'
                f"<title>{html.escape(one.label)}, step {step:g}: {show(value)}</title></circle>"
                for step, value in points
            ]
    legend = "".join(
        f'<li><i class="b{one.colour}"></i>{html.escape(one.label)} <b>{show(one.points[-1][1])}</b></li>'
        for one in series
    )
    name = html.escape(title, quote=True)
    return (
        f'<figure><h3>{name}</h3><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _curve(points: Sequence[tuple[float, float]], x: Callable, y: Callable, style: str) -> str:
    return f'<path class="{style}" d="M{"L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)}"/>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that cover [low, high]: multiples of 1, 2 or 5 times a power of ten, about `most` intervals."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):  # one value, but for rounding
        margin = abs(low) * 0.1 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(start, end + 1)]


def _labels(ticks: Sequence[float], show: Format) -> list[str]:
    """Texts of the ticks, with as many digits as it takes to tell them apart."""
    labels: list[str] = []
    for extra in range(10):
        labels = [show(tick, extra) for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of a run of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in c) / len(c), sum(value for _, value in c) / len(c)) for c in chunks]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over about a twentieth of the curve, narrower at its ends."""
    reach = max(1, len(points) // 40)
    result = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = points[index - near : index + near + 1]
        result.append((step, sum(value for _, value in window) / len(window)))
    return result
