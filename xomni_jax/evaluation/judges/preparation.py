"""How chat models are asked, and what judges do to an image before they look at it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xomni_jax.rewards.chat.messages import encoded


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


def is_skipped(image: Image.Image, question: Mapping[str, Any]) -> bool:
    """Whether the question asks to leave out an image that is entirely black; its reply is None."""
    return question.get("black") == "skip" and image.convert("RGB").getextrema() == ((0, 0),) * 3


def as_shown(image: Image.Image, question: Mapping[str, Any]) -> Image.Image:
    """The image after the encoding that the question asks for."""
    kind = question.get("format", "PNG")
    return image.convert("RGB") if kind == "PNG" else Image.open(io.BytesIO(encoded(image, kind).data)).convert("RGB")
