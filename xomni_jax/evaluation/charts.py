"""Small SVG charts for a page that stands alone: lines, and dots with intervals. Colours are CSS classes s0, s1, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 34
MAX_POINTS = 300  # a line needs no more to be seen


class Line(NamedTuple):
    """One series; `low` and `high` draw a band, `smooth` averages over that many points with the raw line faint behind."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    smooth: int = 1
    dots: bool = False


class Dot(NamedTuple):
    """A value with its interval; `series` is its colour."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    series: int = 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def moving_average(y: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends."""
    y = np.asarray(y, np.float64)
    total = np.concatenate([[0.0], np.cumsum(y)])
    start = np.maximum(np.arange(len(y)) - width // 2, 0)
    stop = np.minimum(np.arange(len(y)) + width // 2 + 1, len(y))
    return (total[stop] - total[start]) / (stop - start)


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    level: tuple[str, float] | None = None,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines over a common x axis as SVG; `level` is a labelled horizontal line, `x_ticks` are labels at given places.

    An empty string without any point.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    every = np.concatenate([np.asarray(v, np.float64) for line in lines for v in (line.y, line.low, line.high) if v is not None])
    low, high = y_range or (float(every.min()), float(every.max()))
    if level:
        low, high = min(low, level[1]), max(high, level[1])
    margin = 0.0 if y_range else 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - margin, high + margin
    x_low, x_high = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    x_high = x_high if x_high > x_low else x_low + 1
    px = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    py = lambda y: TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731

    parts = [_grid([(py(t), f"{t:g}") for t in ticks(low, high)])]
    for t, label in (x_ticks or {t: f"{t:g}" for t in ticks(x_low, x_high, 6)}).items():
        parts.append(f'<text class="tick" x="{px(t):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for i, line in enumerate(lines):
        x = np.asarray(line.x, np.float64)
        path = lambda y, x=x: " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in _thin(x, y))  # noqa: E731
        if line.low is not None and line.high is not None:
            back = " ".join(path(line.high).split(" ")[::-1])
            parts.append(f'<polygon class="band s{i}" points="{path(line.low)} {back}"/>')
        if line.smooth > 1:
            parts.append(f'<polyline class="faint s{i}" points="{path(line.y)}"/>')
        parts.append(f'<polyline class="line s{i}" points="{path(moving_average(line.y, line.smooth))}"/>')
        if line.dots:
            parts += [f'<circle class="dot s{i}" cx="{px(a):.1f}" cy="{py(b):.1f}" r="3.5"/>' for a, b in zip(x, line.y)]
    if level:
        y = py(level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick strong" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[0])}</text>')
    legend = "".join(f'<span><i class="key s{i}"></i>{escape(line.label)}</span>' for i, line in enumerate(lines))
    return _svg(parts, HEIGHT) + (f'<p class="legend">{legend}</p>' if len(lines) > 1 else "")


def dot_chart(dots: Sequence[Dot], high: float = 1.0) -> str:
    """One line per entry: name, interval, dot, number. Entries without a value say so."""
    left, right, row = 118, 44, 26
    height = row * len(dots) + 26
    px = lambda v: left + min(max(v, 0.0), high) / high * (WIDTH - left - right)  # noqa: E731
    parts = []
    for t in ticks(0, high, 5):
        parts.append(f'<line class="grid" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="4" y2="{height - 20}"/>')
        parts.append(f'<text class="tick" x="{px(t):.1f}" y="{height - 6}" text-anchor="middle">{t:g}</text>')
    for i, dot in enumerate(dots):
        y = row * i + row / 2 + 2
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(dot.label)}</text>')
        if dot.value is None:
            parts.append(f'<text class="tick" x="{left}" y="{y + 4}">not measured</text>')
            continue
        if dot.low is not None and dot.high is not None:
            parts.append(f'<line class="whisker s{dot.series}" x1="{px(dot.low):.1f}" x2="{px(dot.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot s{dot.series}" cx="{px(dot.value):.1f}" cy="{y}" r="5.5"/>')
        parts.append(f'<text class="value" x="{WIDTH - 4}" y="{y + 4}" text-anchor="end">{dot.value:.2f}</text>')
    return _svg(parts, height)


def _grid(levels: Sequence[tuple[float, str]]) -> str:
    lines = (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in levels
    )
    return "".join(lines)


def _thin(x: np.ndarray, y: Sequence[float]) -> list[tuple[float, float]]:
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    y = np.asarray(y, np.float64)
    return [(x[i], y[i]) for i in keep]


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
