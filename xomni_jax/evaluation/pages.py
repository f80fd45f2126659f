"""Pages that need no other file: templates of assets/templates with the style, the script, the charts and the images inside."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from xomni_jax.evaluation.run_directory import write_text


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("xomni_jax", "assets/templates"),
        autoescape=jinja2.select_autoescape(["html"]),  # page.css and items.js are included as they are
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Writes a page made from a template of assets/templates and returns its path. All values are text to be escaped, but for charts."""
    return write_text(Path(path), _templates().get_template(template).render(**values))


def image_data(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    """An image as a data: URL."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
