"""What every judge does to a picture before it looks at it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image


def is_skipped(picture: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out a picture that is entirely black; its reply is None."""
    return question.get("black") == "skip" and picture.convert("RGB").getextrema() == ((0, 0),) * 3


def format_of(question: Mapping[str, Any]) -> str:
    """The kind of file that the question wants the picture to be: PNG, or JPEG with Pillow's defaults."""
    return question.get("format", "PNG")


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    picture.convert("RGB").save(out, kind, **({"compress_level": 1} if kind == "PNG" else {}))
    return out.getvalue()


def seen(picture: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The picture after that encoding, as a judge would see it."""
    kind = format_of(question)
    return picture.convert("RGB") if kind == "PNG" else Image.open(io.BytesIO(encoded(picture, kind))).convert("RGB")
