"""Does a judge agree with known answers? Images rendered here: signs for OCR, shapes for yes/no questions, objects for a detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.evaluation.suite import INSTRUCTIONS, Judge, is_unreadable
from xomni_jax.evaluation.suites.geneval import counted_boxes
from xomni_jax.evaluation.suites.longtext import clean, tokens

LEAST = 0.8  # share of known answers that a judge must give
_SIDE = 480  # pixels of an image
_COLOURS = {"red": (205, 35, 40), "green": (40, 150, 60), "blue": (40, 70, 210), "yellow": (240, 210, 50)}
_SIGNS = ("OPEN DAILY", "Fresh Bread", "Room 417", "Please mind the step", "")


class Known(NamedTuple):
    """An image, a question about it, what the right answer is in words, and whether a reply is right."""

    image: Image.Image
    question: dict[str, Any]
    wanted: str
    is_right: Callable[[Any], bool]


class Checked(NamedTuple):
    """What a judge said to one question."""

    known: Known
    reply: Any
    right: bool


def check(kind: str, judge: Judge) -> list[Checked]:
    """Asks a judge of the kind "ocr", "vqa" or "detector" every question of that kind. Raises JudgeUnavailable."""
    known = list(KNOWN[kind]())
    replies = judge.ask([one.image for one in known], [[one.question] for one in known])
    return [Checked(one, reply, not is_unreadable(reply) and one.is_right(reply)) for one, (reply,) in zip(known, replies)]


def signs() -> Iterator[Known]:
    """Black words on white and white words on blue, and an empty sign."""
    font = _font("DejaVuSans-Bold", 40)
    for text in _SIGNS:
        for ground, ink in (("white", "black"), ((30, 60, 150), "white")):
            image = Image.new("RGB", (_SIDE, _SIDE // 2), ground)
            ImageDraw.Draw(image).text((_SIDE // 2, _SIDE // 4), text, fill=ink, font=font, anchor="mm")
            question = {"instruction": INSTRUCTIONS["ocr"], "max_tokens": 128}
            wanted = sorted(tokens(text, "en"))
            yield Known(image, question, text or "no text", lambda reply, wanted=wanted: sorted(tokens(clean(reply, True), "en")) == wanted)


def shapes() -> Iterator[Known]:
    """One shape on white; half of the questions ask for another shape or colour."""
    middle, radius = (_SIDE // 2, _SIDE // 2), _SIDE // 4
    for colour, sides in (("red", 0), ("green", 4), ("blue", 3), ("yellow", 0)):
        image = Image.new("RGB", (_SIDE, _SIDE), "white")
        if sides:
            ImageDraw.Draw(image).regular_polygon((*middle, radius), sides, fill=_COLOURS[colour])
        else:
            ImageDraw.Draw(image).circle(middle, radius, fill=_COLOURS[colour])
        name = {0: "circle", 3: "triangle", 4: "square"}[sides]
        others = (("square" if name == "circle" else "circle", colour), (name, "purple"))
        for shape, shade, wanted in ((name, colour, "yes"), (name, colour, "yes"), (*others[0], "no"), (*others[1], "no")):
            question = INSTRUCTIONS["yes-no"].format(question=f"Is there a {shade} {shape} in the image?")
            asked = {"instruction": question, "max_tokens": 8, "answers": ["yes", "no"]}
            yield Known(image, asked, wanted, lambda reply, wanted=wanted: reply == wanted)


def objects() -> Iterator[Known]:
    """A stop sign, a clock and a traffic light, drawn plainly; each must be found, a giraffe must not."""
    for name, colour, draw in (("stop sign", "red", _stop_sign), ("clock", None, _clock), ("traffic light", None, _traffic_light)):
        image = Image.new("RGB", (_SIDE, _SIDE), (150, 190, 225))
        draw(ImageDraw.Draw(image))
        question = {"classes": sorted([name, "giraffe"]), "coloured": [name] if colour else [], "min_score": 0.3, "at_most": 16}

        def is_right(found: Any, name: str = name, colour: str | None = colour) -> bool:
            boxes = counted_boxes(found, "")
            return set(boxes) == {name} and (colour is None or boxes[name][0]["color"] == colour)

        yield Known(image, question, f"a {colour + ' ' if colour else ''}{name} and no giraffe", is_right)


KNOWN: dict[str, Callable[[], Iterator[Known]]] = {"ocr": signs, "vqa": shapes, "detector": objects}


def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", pixels)


def _stop_sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((232, 300, 248, 480), fill=(120, 120, 120))
    for radius, colour in ((150, "white"), (138, (190, 20, 30))):
        draw.regular_polygon((240, 200, radius), 8, rotation=22, fill=colour)
    draw.text(
        (240, 200), "STOP", fill="white", anchor="mm", font=ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 78)
    )


def _clock(draw: ImageDraw.ImageDraw) -> None:
    draw.circle((240, 240), 170, fill="white", outline=(40, 30, 30), width=16)
    at = lambda hour, radius: (240 + radius * math.sin(hour * math.pi / 6), 240 - radius * math.cos(hour * math.pi / 6))
    font = _font("DejaVuSans", 30)
    for hour in range(1, 13):
        draw.text(at(hour, 125), str(hour), fill="black", anchor="mm", font=font)
    draw.line((240, 240, *at(10.15, 75)), fill="black", width=10)
    draw.line((240, 240, *at(2, 110)), fill="black", width=6)


def _traffic_light(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((230, 380, 250, 480), fill=(70, 70, 70))
    draw.rounded_rectangle((175, 60, 305, 390), 20, fill=(30, 30, 30))
    for y, colour in ((120, (230, 30, 30)), (225, (90, 80, 20)), (330, (20, 80, 40))):
        draw.circle((240, y), 42, fill=colour)
