"""Conversations about images, in the layouts of LLaVA, of `messages` and of The Cauldron: turns of text with marks for the images.

A mark `<image N>` stands where image N is shown; images are numbered from 0 in the order in which they are shown. `<image N context>` marks
one of the assistant that is not to be learned: a part of a turn says so with "learn": false. What is said by `plain` stands outside of the
chat template, as prompts of images do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xomni_jax.data.tables import FaultyRecord

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "plain": "plain",
}
_MARK = re.compile(r"(<image>)")
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text"), ("image", "image_url", "input_image")


class Conversation(NamedTuple):
    """What was said, and the images in the order in which they are shown.

    Attributes:
      system: the instruction that stands above the conversation, or "".
      turns: (user | assistant | plain, text with marks).
      images: as the record gives them: bytes, paths, or maps of these.
      roles: of the images: "output" where it is learned, as of the assistant and in plain turns, else "input"; empty when none is.
      notes: what was amended, in words.
    """

    system: str
    turns: list[tuple[str, str]]
    images: list[Any]
    roles: list[str]
    notes: list[str]


def of_llava(said: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Conversation:
    """`conversations`: a list of {from, value}. Without marks the images stand in front, each on a line of its own."""
    return _conversation([(turn.get("from"), turn.get("value")) for turn in said], images, "\n")


def of_messages(said: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Conversation:
    """`messages`: a list of {role, content}, where content is text or a list of typed parts (TRL, OpenAI, Anthropic)."""
    return _conversation([(turn.get("role"), turn.get("content")) for turn in said], images, "")


def of_questions(said: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Conversation:
    """`texts` of The Cauldron: a list of {user, assistant}, without marks: all images stand before the first question."""
    turns = [(role, turn.get(role)) for turn in said for role in ("user", "assistant")]
    return _conversation([("user", "<image>" * len(images) + (turns[0][1] or "")), *turns[1:]] if turns else [], images, "")


def counted(number: int, what: str) -> str:
    """`2 images`, `1 image`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Shown:
    """The images of a conversation while it is read.

    Attributes:
      images, roles: those that have been shown, in this order.
      unseen: numbers of the given images that have not.
      marks: how many places ask for one of the given images.
      lacks: whether one of them found none.
    """

    def __init__(self, given: Sequence[Any]):
        self.given, self.unseen, self.marks, self.lacks = given, list(range(len(given))), 0, False
        self.images: list[Any] = []
        self.roles: list[str] = []

    def mark(self, role: str, image: Any, learn: bool = True) -> str:
        """The mark of an image that is shown now."""
        drawn = role in ("assistant", "plain")
        self.images.append(image)
        self.roles.append("output" if drawn and learn else "input")
        return f"<image {len(self.images) - 1}{' context' if drawn and not learn else ''}>"

    def given_one(self, role: str, number: int | None = None, learn: bool = True) -> str:
        """The mark of a given image, by default of the next one; nothing when there is none, which `check` refuses in the end."""
        self.marks += 1
        number = number if number is not None else self.unseen[0] if self.unseen else -1
        if not 0 <= number < len(self.given):
            self.lacks = True
            return ""
        if number in self.unseen:
            self.unseen.remove(number)
        return self.mark(role, self.given[number], learn)

    def check(self) -> None:
        """FaultyRecord when there are more marks than images, or fewer."""
        if self.unseen or self.lacks:
            raise FaultyRecord(f"{counted(self.marks, 'image mark')} but {counted(len(self.given), 'image')}")


def _conversation(said: Sequence[tuple[Any, Any]], images: Sequence[Any], after_mark: str) -> Conversation:
    shown, system, turns, notes = _Shown(images), "", [], []
    typed = any(isinstance(content, Sequence) and not isinstance(content, str) for _, content in said)
    for source, content in said:
        role = ROLES.get(source)
        if role is None:
            raise FaultyRecord(f"a turn is said by {source!r}, not by {', '.join(ROLES)}")
        if role == "system":
            system = _content(role, content, shown).strip()
        elif role == "assistant" and not turns:
            notes.append("a leading answer is left out")
        else:
            if not turns and images and not typed and not any("<image>" in str(text) for _, text in said):
                notes.append("no image mark: put in front")
                content = ("<image>" + after_mark) * len(images) + (content or "")
            turns.append((role, _content(role, content, shown).strip()))
    shown.check()
    for role, text in turns:
        if not text:
            raise FaultyRecord("empty answer" if role == "assistant" else "empty question")
    if not turns:
        raise FaultyRecord("no text: the conversation is empty")
    return Conversation(system, turns, shown.images, shown.roles if "output" in shown.roles else [], notes)


def _content(role: str, content: Any, shown: _Shown) -> str:
    """The text of one turn with its marks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return "".join(shown.given_one(role) if piece == "<image>" else piece for piece in _MARK.split(content))
    if not isinstance(content, Sequence):
        raise FaultyRecord(f"the content of a turn is {type(content).__name__}, neither text nor a list of parts")
    return "".join(_part(role, part, shown) for part in content)


def _part(role: str, part: Any, shown: _Shown) -> str:
    if isinstance(part, str):
        return _content(role, part, shown)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in _TEXT_PARTS:
        return part.get("text") or ""
    if kind not in _IMAGE_PARTS:
        raise FaultyRecord(f"a part of a turn is of type {kind!r}, not one of {', '.join(_TEXT_PARTS + _IMAGE_PARTS)}")
    image = next((part[name] for name in ("image", "image_url", "path", "bytes", "source") if part.get(name) is not None), None)
    if isinstance(image, Mapping) and image.get("url") is not None:  # OpenAI
        image = image["url"]
    if isinstance(image, Mapping) and image.get("data") is not None:  # Anthropic
        image = f"data:{image.get('media_type')};base64,{image['data']}"
    learn = part.get("learn") is not False
    return shown.given_one(role, part.get("index"), learn) if image is None else shown.mark(role, image, learn)
