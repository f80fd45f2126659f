"""What a detector's reply must look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_detections(found: Any, question: Mapping[str, Any]) -> None:
    """Raises ValueError, saying what is wrong, unless `found` is {class: [{"box", "score", "color"}]} as the question asks for it."""
    if not isinstance(found, dict):
        raise ValueError(f"the detections are {_shown(found)}, not lists of boxes by class")
    for name, boxes in found.items():
        if not isinstance(boxes, list):
            raise ValueError(f"the detections of {name!r} are {_shown(boxes)}, not a list")
        for box in boxes:
            if not isinstance(box, dict):
                raise ValueError(f"a detection of {name!r} is {_shown(box)}, not an object with box and score")
            corners = box.get("box")
            if not isinstance(corners, list | tuple) or len(corners) != 4 or not all(map(_is_number, corners)):
                raise ValueError(f"the box of a {name!r} is {_shown(corners)}, not four numbers")
            if not _is_number(box.get("score")) or not 0 <= box["score"] <= 1:
                raise ValueError(f"the score of a {name!r} is {_shown(box.get('score'))}, not a number from 0 to 1")
            if name in question.get("coloured", ()) and not isinstance(box.get("color"), str):
                raise ValueError(f"the color of a {name!r} is {_shown(box.get('color'))}, not a name, and it was asked for")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
