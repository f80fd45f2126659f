"""What every judge does to a picture before it looks at it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image


def is_skipped(picture: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out a picture that is entirely black; its reply is None."""
    return question.get("black") == "skip" and picture.convert("RGB").getextrema() == ((0, 0),) * 3


def encoded(picture: Image.Image, question: Mapping[str, Any]) -> tuple[bytes, str]:
    """The picture as the file that the question asks for (PNG, or JPEG with Pillow's defaults) and its media type."""
    kind = question.get("format", "PNG")
    out = io.BytesIO()
    picture.convert("RGB").save(out, kind)
    return out.getvalue(), f"image/{kind.lower()}"


def seen(picture: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The picture after that encoding, as a judge would see it."""
    if question.get("format", "PNG") == "PNG":
        return picture.convert("RGB")
    return Image.open(io.BytesIO(encoded(picture, question)[0])).convert("RGB")
