"""Charts of the pages: matplotlib figures as inline SVG in the colours of the page, light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, ROW_HEIGHT = 420, 230, 26  # pixels; matplotlib's SVG has 72 to the inch
SERIES = ("#74829a", "#c2410c", "#1971c2", "#5f3dc4")
INK, SOFT, GRID = "#1c2430", "#5b6675", "#dfe4ea"
# Colours become the custom properties of page.css, which has a second set of values for dark screens.
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--line)"} | {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
}


class Line(NamedTuple):
    """One series; `low` and `high` draw a band, `smooth` averages over that many points, with the raw line faint behind."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    smooth: int = 1
    dots: bool = False


class Dot(NamedTuple):
    """A value with its interval; `series` is the number of its colour."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    series: int = 0


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    level: tuple[str, float] | None = None,
    powers_of_two: bool = False,
) -> str:
    """Lines over a common x axis; empty without any point.

    Args:
      title: what is shown, for readers who hear the page.
      level: label and height of a horizontal line.
      powers_of_two: the x axis is logarithmic, with a tick at every point.
    """
    lines = [line for line in lines if len(line.x)]

    def draw(axes: Axes) -> None:
        for line, colour in zip(lines, itertools.cycle(SERIES)):
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
            if line.smooth > 1:
                axes.plot(line.x, line.y, color=colour, alpha=0.3, linewidth=1)
            axes.plot(line.x, moving_average(line.y, line.smooth), "o-" if line.dots else "-", color=colour, label=line.label, linewidth=2)
        if level:
            axes.axhline(level[1], color=SERIES[1], linestyle=(0, (4, 3)), linewidth=1.5)
            place = dict(xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points")
            axes.annotate(level[0], (0, level[1]), color=SERIES[1], weight="bold", **place)
        if powers_of_two:
            axes.set_xscale("log", base=2)
            axes.set_xticks(lines[0].x, [f"{x:g}" for x in lines[0].x], minor=False)
            axes.minorticks_off()
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(x_label)
        axes.set_ylim(y_range)
        if len(lines) > 1:
            axes.figure.legend(loc="outside lower left", ncols=len(lines))

    return _svg(title, HEIGHT, draw) if lines else ""


def dot_chart(title: str, dots: Sequence[Dot]) -> str:
    """One row per entry, for values from 0 to 1: name, interval, dot, number. Entries without a value say so."""

    def draw(axes: Axes) -> None:
        for row, dot in enumerate(dots):
            if dot.value is None:
                axes.annotate("not measured", (0, row), va="center", color=SOFT)
                continue
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [row, row], color=SERIES[dot.series], alpha=0.35, linewidth=5, solid_capstyle="round")
            axes.plot(dot.value, row, "o", color=SERIES[dot.series], markersize=10)
            axes.annotate(f"{dot.value:.2f}", (1.04, row), xycoords=("axes fraction", "data"), va="center", weight="bold")
        axes.grid(axis="y", visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.set_yticks(range(len(dots)), [dot.label for dot in dots], color=INK)

    return _svg(title, ROW_HEIGHT * (len(dots) + 1), draw)


def bar_chart(title: str, parts: Mapping[str, float], limit: float, unit: str) -> str:
    """One bar made of parts, with a line where it must end."""

    def draw(axes: Axes) -> None:
        left = 0.0
        for (label, size), colour in zip(parts.items(), itertools.cycle(SERIES[2:])):
            axes.barh(0, size, left=left, color=colour, label=f"{label} {size:.2f}")
            left += size
        axes.axvline(limit, color=SERIES[1], linewidth=2, label=f"limit {limit:.2f}")
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.set_xlabel(unit)
        axes.figure.legend(loc="outside lower left", ncols=len(parts) + 1)

    return _svg(title, 4 * ROW_HEIGHT, draw)


def moving_average(y: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends."""
    y = np.asarray(y, np.float64)
    total = np.concatenate([[0.0], np.cumsum(y)])
    start = np.maximum(np.arange(len(y)) - width // 2, 0)
    stop = np.minimum(np.arange(len(y)) + width // 2 + 1, len(y))
    return (total[stop] - total[start]) / (stop - start)


def _svg(title: str, height: float, draw: Callable[[Axes], None]) -> Markup:
    """What `draw` puts into the axes of a figure, as an SVG element that refers to nothing outside itself."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # names of markers: the same in every run, others in every chart
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure.add_subplot())
        for artist in figure.findobj():
            artist.set_clip_on(False)
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = re.sub(r'<g id="[^"]*"', "<g", file.getvalue().partition("<svg ")[2])
    for colour, variable in VARIABLES.items():
        element = element.replace(colour, variable)
    return Markup(f'<svg role="img" aria-label="{escape(title)}" {element}')
