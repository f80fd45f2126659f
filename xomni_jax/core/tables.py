"""Tables as text: aligned columns for a terminal, Markdown, and CSV; the numbers in their cells; and sizes of files.

A row is a sequence of cells, the first of which names it; the first row is the heading. A cell is a text, or a pair of a text and a note
about it, such as an estimate and its interval.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

TableCell = str | tuple[str, str]
UNKNOWN = "–"


def aligned(rows: Sequence[Sequence[TableCell]]) -> str:
    """Columns for a terminal: the first to the left, the others to the right, notes in brackets."""
    texts = [[_one_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * width for width in widths])
    lines = ((row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))) for row in texts)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _one_text(cell: TableCell) -> str:
    if isinstance(cell, str):
        return cell
    text, note = cell
    return f"{text} [{note}]" if note else text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def csv_text(rows: Iterable[Sequence[Any]], quoting: int = csv.QUOTE_MINIMAL) -> str:
    """A CSV file; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, quoting=quoting, lineterminator="\n").writerows(rows)
    return file.getvalue()


def format_number(value: float | None, form: str = ".4f", scale: float = 1.0) -> str:
    """`scale * value` by a format, or a dash for what is unknown."""
    return UNKNOWN if value is None else format(scale * value, form)


def format_interval(pair: Sequence[float | None] | None, form: str = ".4f", scale: float = 1.0) -> str:
    """ "LOW to HIGH", an open end as infinity; empty where there is no interval."""
    return "" if pair is None else " to ".join("∞" if v is None else format(scale * v, form) for v in pair)


def format_estimate(measured: dict[str, Any], form: str = ".4f", scale: float = 1.0) -> TableCell:
    """A cell of {"value", "ci95"}: the value, with its 95% interval as the note."""
    return format_number(measured["value"], form, scale), format_interval(measured["ci95"], form, scale)


def bytes_text(n: float) -> str:
    """A number of bytes in a unit that leaves one to three digits before the point."""
    for unit in ("B", "KB", "MB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
