"""How chat models are asked, and what judges do to an image before they look at it."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

# Speed counts more than size: an image is sent once or a few times and thrown away.
_HOW = {"PNG": {"compress_level": 1, "compress_type": 3}, "JPEG": {}, "WEBP": {"lossless": True, "quality": 0, "method": 0}}


@dataclass(frozen=True)
class ChatOptions:
    """How a chat model is asked.

    Attributes:
      concurrency: requests to a chat model at a time; the results do not depend on it
      image_format: PNG, JPEG or WEBP, in which images are sent; None: as the suite says, which is PNG for all but OneIG-Bench
      thinking_tokens: tokens that a model may use for thinking beside those of its answer, if it thinks
    """

    concurrency: int = 16
    image_format: str | None = None
    thinking_tokens: int = 4096


@dataclass(frozen=True)
class EncodedImage:
    """An image as a file of the kind PNG, JPEG (Pillow's default quality) or WEBP (lossless)."""

    kind: str
    data: bytes

    @functools.cached_property
    def url(self) -> bytes:
        """The file as a data URL."""
        return f"data:image/{self.kind.lower()};base64,".encode() + base64.b64encode(self.data)


def encoded(image: Image.Image, kind: str) -> EncodedImage:
    """The image as a file."""
    out = io.BytesIO()
    image.convert("RGB").save(out, kind, **_HOW[kind])
    return EncodedImage(kind, out.getvalue())


def is_skipped(image: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out an image that is entirely black; its reply is None."""
    return question.get("black") == "skip" and image.convert("RGB").getextrema() == ((0, 0),) * 3


def as_shown(image: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The image after the encoding that the question asks for."""
    kind = question.get("format", "PNG")
    return image.convert("RGB") if kind == "PNG" else Image.open(io.BytesIO(encoded(image, kind).data)).convert("RGB")
