"""What a chat model is asked: text and images in one message, and the two kinds of answers that judges read."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from xomni_jax.data.png import png_bytes
from xomni_jax.rewards.chat.replies import Completion, Unreadable

_HOW = {"JPEG": {}, "WEBP": {"lossless": True, "quality": 0, "method": 0}}  # fast: a file is sent once or a few times and thrown away


class ChatUnavailable(ValueError):
    """A chat model does not answer. One sentence."""


class ChatRefused(ChatUnavailable):
    """An endpoint answers that it does not take a question: it would not take it the next time, either."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as a file of the kind PNG, JPEG (Pillow's default quality) or WEBP (lossless)."""

    kind: str
    data: bytes

    @functools.cached_property
    def url(self) -> bytes:
        """The file as a data URL."""
        return f"data:image/{self.kind.lower()};base64,".encode() + base64.b64encode(self.data)


def encoded(image: Image.Image, kind: str = "PNG") -> EncodedImage:
    """The image as a file."""
    if kind == "PNG":
        return EncodedImage(kind, png_bytes(image))
    out = io.BytesIO()
    image.convert("RGB").save(out, kind, **_HOW[kind])
    return EncodedImage(kind, out.getvalue())


class Question(NamedTuple):
    """One user message: the images first, then the text."""

    text: str
    images: tuple[EncodedImage, ...] = ()


class ChatModel(Protocol):
    """A model that is asked one message at a time, greedily, without memory of earlier ones.

    Attributes:
      name, settings: which model answers, for result files.
      model_hash: sha256 of its weight files; "" where they are on another machine.
    """

    name: str
    settings: Mapping[str, str]
    model_hash: str

    def complete(self, question: Question, max_tokens: int) -> Completion:
        """The reply. Raises ChatUnavailable when there is none, Unreadable when the model refuses."""
        ...

    def complete_all(self, questions: Sequence[Question], max_tokens: int) -> list[Completion | ChatUnavailable | Unreadable]:
        """The replies in order, several questions at a time; a question that fails has its error in the place of a reply."""
        ...

    def first_tokens(self, questions: Sequence[Question], words: Sequence[str]) -> list[dict[str, float] | ChatUnavailable | Unreadable]:
        """Probabilities of the first token of each reply by its text: of the likeliest, and of those that are one of the words.

        Case and space around a token do not count in the choice of those of the words.
        """
        ...

    def close(self) -> None:
        """Frees connections or the model."""


def quoted(text: str, closing: str = "") -> str:
    """Text of a user as a part of an instruction: it can end neither its quotation nor its message.

    Line breaks become spaces, angle brackets (special tokens, tags) and the `closing` characters become others that look alike.
    """
    alike = str.maketrans('<>[]"', "‹›()'")
    return " ".join("".join(c.translate(alike) if c in "<>" + closing else c for c in text).split())
