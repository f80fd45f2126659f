"""Pieces of a page that stands alone: its frame with the style inside, sections, tables, images, numbers."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image


def document(title: str, body: str, *more: str) -> str:
    """A whole page that needs no other file. Title and body are HTML; `more` names assets beside report.css: further styles, and scripts for the end."""
    read = lambda name: (resources.files("xomni_jax") / "assets" / name).read_text(encoding="utf-8")  # noqa: E731
    style = "".join(read(name) for name in ("report.css", *more) if name.endswith(".css"))
    script = "".join(f"<script>{read(name)}</script>" for name in more if name.endswith(".js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><main>{body}</main>{script}</body></html>\n"
    )


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file; readers see the old one or the whole new one. Returns its path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")  # several processes may finish a run together
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)
    return path


def image_data(image: Image.Image, form: str = "PNG", **options: object) -> str:
    """An image as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], marked: Sequence[str] = ()) -> str:
    """A table whose first column names the rows; cells are HTML already, rows named in `marked` stand out."""
    top = "".join(f"<th>{h}</th>" for h in head)
    lines = "".join(
        f"<tr{' class=rl' * (name in marked)}><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows
    )
    return scroll(f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>")


def facts_table(facts: dict[str, object]) -> str:
    """Names and values, such as settings."""
    show = lambda v: ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)  # noqa: E731
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(show(v))}</td></tr>" for k, v in facts.items())
    return scroll(f"<table class=facts><tbody>{rows}</tbody></table>")


def section(title: str, content: str, layout: str = "", text: str = "") -> str:
    """A titled section; `layout` is a class of the inner box."""
    head = f"<h2>{title}</h2>" if title else ""
    return f"<section>{head}{f'<p>{escape(text)}</p>' if text else ''}<div class='{layout}'>{content}</div></section>"


def figure(svg: str, title: str) -> str:
    """A chart under its title; nothing when there is no chart."""
    return f"<div class=chart><h3>{escape(title)}</h3>{svg}</div>" if svg else ""


def scroll(table: str) -> str:
    """Wide tables scroll inside their own box."""
    return f"<div class=scroll tabindex=0>{table}</div>"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number, or a dash."""
    return "&ndash;" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "&ndash;" if value is None else f"{100 * value:.0f}%"


def points(value: float | None) -> str:
    """A difference of shares in points."""
    return "&ndash;" if value is None else f"{100 * value:+.0f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "&ndash;" if value is None else f"{value:.2f}&times;"


def interval(pair: Sequence[float | None] | None, scale: float = 1.0, form: str = ".2f") -> str:
    """An interval in small print."""
    return "" if pair is None else f"<small>{interval_text(pair, scale, form)}</small>"


def interval_text(pair: Sequence[float | None] | None, scale: float = 1.0, form: str = ".2f") -> str:
    """An interval in words; an open end is infinite."""
    return "unknown" if pair is None else " to ".join("&infin;" if v is None else format(scale * v, form) for v in pair)
