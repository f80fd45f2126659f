"""Pages that need no other file: templates of assets/templates with the style, the script, the charts and the images inside."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from xomni_jax.core.folders import write_text

Marked = list[tuple[str, str]]  # parts of a text, each with the name of the HTML element that marks it, "" for none
HEAD, SLACK = 220, 66  # characters of a long text that are shown before it is unfolded; a text so little longer is shown whole


@functools.cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("xomni_jax", "assets/templates"),
        autoescape=jinja2.select_autoescape(["html"]),  # page.css and items.js are included as they are
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["head_and_rest"] = head_and_rest
    return templates


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Writes a page made from a template of assets/templates and returns its path. All values are text to be escaped, but for charts."""
    return write_text(Path(path), _templates().get_template(template).render(**values))


def head_and_rest(text: str | Marked) -> tuple[Marked, Marked]:
    """The beginning of a long text, cut at a space where there is one, and what is left; all of a short one, and nothing."""
    parts = [("", text)] if isinstance(text, str) else text
    room = HEAD
    if sum(len(text) for _, text in parts) > HEAD + SLACK:
        for n, (mark, text) in enumerate(parts):
            if len(text) > room:
                cut = text.rfind(" ", 0, room) + 1 or room
                return [*parts[:n], (mark, text[:cut])], [(mark, text[cut:]), *parts[n + 1 :]]
            room -= len(text)
    return parts, []


def image_data(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    """An image as a data: URL."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
