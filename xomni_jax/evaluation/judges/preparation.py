"""What judges do to an image before they look at it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image


def is_skipped(image: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out an image that is entirely black; its reply is None."""
    return question.get("black") == "skip" and image.convert("RGB").getextrema() == ((0, 0),) * 3


def encoded(image: Image.Image, kind: str) -> bytes:
    """The image as a file: PNG, or JPEG with Pillow's defaults."""
    out = io.BytesIO()
    image.convert("RGB").save(out, kind, **({"compress_level": 1} if kind == "PNG" else {}))
    return out.getvalue()


def as_shown(image: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The image after the encoding that the question asks for."""
    kind = question.get("format", "PNG")
    return image.convert("RGB") if kind == "PNG" else Image.open(io.BytesIO(encoded(image, kind))).convert("RGB")
