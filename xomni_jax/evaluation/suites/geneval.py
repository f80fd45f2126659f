"""GenEval (djghosh13/geneval): does a detector find the objects, counts, colours and positions that the prompt asks for?

Four images per prompt; the judge reports detections, the rules here decide, as in the official scorer: only as many boxes as are asked
for, the most confident ones, are looked at for colour and position. Overall is the mean of the tags' means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import Item, Record, SuiteError, read_drawn, write_image
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import ratio, ratios_by
from xomni_jax.rewards.services.detector import COCO, COLOURS

_METADATA = "85209 sha256:5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
RELATIONS = ("left of", "right of", "above", "below")
_CONFIDENCE, _COUNTING_CONFIDENCE, _MOST_BOXES = 0.3, 0.9, 16
_SHRINK = 0.1  # share of both boxes' sizes that an offset must exceed to be one

Box = Mapping[str, Any]  # {"box": [x1, y1, x2, y2], "score": confidence, "color": name where it was asked for}
Detections = Mapping[str, Sequence[Box]]


class GenEval(PublishedSuite):
    """geneval. Images lie as {id}/samples/{k}.png, with the prompt's row in {id}/metadata.jsonl."""

    title = "GenEval"
    repeats = 4
    judge = "detector"
    published = 553
    folders = ("geneval", "prompts")
    downloads = ((Download(f"{GITHUB} djghosh13/geneval, folder prompts", {"evaluation_metadata.jsonl": _METADATA}),),)

    def load(self, data: Path) -> list[Item]:
        """Items of the published jsonl; the id is the row's index with five digits, the official folder's name."""
        paths = self.find(data, "evaluation_metadata.jsonl")
        return unique_items((_item(n, row), row.where) for n, row in enumerate(read_rows(paths)))

    def questions(self, item: Item) -> Sequence[Any]:
        """One request: the classes that matter, those whose colour is asked for, and which detections to report."""
        metadata = item.fields["metadata"]
        clauses = [*metadata["include"], *metadata.get("exclude", ())]
        return (
            {
                "classes": sorted({c["class"] for c in clauses}),
                "coloured": sorted({c["class"] for c in clauses if "color" in c}),
                "min_score": _CONFIDENCE,
                "at_most": _MOST_BOXES,
            },
        )

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """correct: right images of the item; images: judged ones."""
        verdicts = [judge(item.fields["metadata"], found) for (found,) in outputs]
        right = sum(correct for correct, _ in verdicts)
        return {
            "score": right / len(outputs),
            "correct": right,
            "images": len(outputs),
            "any": int(right > 0),
            "one": 1,
            "verdicts": ["correct" if correct else reason for correct, reason in verdicts],
            "unparsed": 0,
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Per tag the mean over images; overall the unweighted mean of the tags."""
        tags = ratios_by(records, "category", "correct", "images")
        overall = sum(t["score"] for t in tags.values()) / len(tags)
        scores = {
            "overall": overall,
            "correct images": ratio(records, "correct", "images"),
            "prompts with a correct image": ratio(records, "any", "one"),
        }
        return {"headline": "overall", "scores": scores, "categories": tags}

    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        folder = directory / item.id
        for k, image in enumerate(images):
            write_image(folder / "samples" / f"{k:04d}.png", image)
        (folder / "metadata.jsonl").write_text(json.dumps(item.fields["metadata"]) + "\n", encoding="utf-8")

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        return [read_drawn(directory / item.id / "samples" / f"{k:04d}.png") for k in range(self.repeats)]


def counted_boxes(found: Detections, tag: str) -> dict[str, list[Box]]:
    """The boxes that count, most confident first."""
    least = _COUNTING_CONFIDENCE if tag == "counting" else _CONFIDENCE
    sure = {name: sorted((b for b in boxes if b["score"] > least), key=lambda b: -b["score"]) for name, boxes in found.items()}
    return {name: boxes[:_MOST_BOXES] for name, boxes in sure.items() if boxes}


def relations(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """What box a is to box b, of RELATIONS; two can hold at once, none when the offset is small beside the boxes. y grows down."""
    offset = [((a[i] + a[i + 2]) - (b[i] + b[i + 2])) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    reduced = [math.copysign(max(abs(o) - _SHRINK * s, 0.0), o) for o, s in zip(offset, sizes)]
    if all(abs(r) < 1e-3 for r in reduced):
        return []
    x, y = (r / math.sqrt(offset[0] ** 2 + offset[1] ** 2) for r in reduced)  # by the length of the offset that was not reduced
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return sorted(name for name in RELATIONS if holds[name])


def judge(metadata: Mapping[str, Any], found: Detections) -> tuple[bool, str]:
    """Whether an image shows what its row asks for, and what is wrong with it, in the official scorer's words."""
    boxes = counted_boxes(found, metadata["tag"])
    reasons: list[str] = []
    passed: list[list[Box] | None] = []
    for clause in metadata["include"]:
        used = boxes.get(clause["class"], [])[: clause["count"]]
        wrong = _colour(clause, used) or _position(clause, used, passed)
        if len(used) < clause["count"]:
            wrong = f"expected {clause['class']}>={clause['count']}, found {len(used)}"
        passed.append(None if wrong else used)
        reasons += [wrong] if wrong else []
    for clause in metadata.get("exclude", ()):
        number = len(boxes.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return not reasons, "\n".join(reasons)


def _colour(clause: Mapping[str, Any], used: Sequence[Box]) -> str:
    wanted = clause.get("color")
    seen = [box["color"] for box in used] if wanted else []
    if not wanted or seen.count(wanted) >= clause["count"]:
        return ""
    listed = ", ".join(f"{seen.count(c)} {c}" for c in COLOURS if c in seen)
    return f"expected {wanted} {clause['class']}>={clause['count']}, found {seen.count(wanted)} {wanted}; and {listed}"


def _position(clause: Mapping[str, Any], used: Sequence[Box], passed: Sequence[Sequence[Box] | None]) -> str:
    if "position" not in clause:
        return ""
    relation, target = clause["position"]
    if passed[target] is None:
        return f"no target for {clause['class']} to be {relation}"
    for box in used:
        for other in passed[target] or ():
            holds = relations(box["box"], other["box"])
            if relation not in holds:
                return f"expected {clause['class']} {relation} target, found {' and '.join(holds)} target"
    return ""


def _item(number: int, row: Row) -> Item:
    if not row.get("include", kind=list):
        raise row.wrong("include", "is empty, so every image would be right")
    for name in ("include", "exclude") if "exclude" in row.values else ("include",):
        for n, clause in enumerate(row.get(name, kind=list)):
            _check_clause(clause, n, f"{row.where}: {name} clause {n}")
    return Item(f"{number:05d}", row.text("prompt"), {"category": row.text("tag"), "metadata": row.values})


def _check_clause(clause: Any, number: int, where: str) -> None:
    if not isinstance(clause, dict) or clause.get("class") not in COCO:
        name = clause.get("class") if isinstance(clause, dict) else clause
        raise SuiteError(f"{where} has the class {name!r}, which is none of the 80 that the detector knows")
    if type(clause.get("count")) is not int or clause["count"] < 1:  # not isinstance: True is an int
        raise SuiteError(f"{where} has count {clause.get('count')!r}, not a whole number from 1")
    if clause.get("color", COLOURS[0]) not in COLOURS:
        raise SuiteError(f"{where} asks for the colour {clause['color']!r}, which is not one of {', '.join(COLOURS)}")
    allowed = [json.dumps([relation, target]) for relation in RELATIONS for target in range(number)]  # as text: 0 equals false and 0.0
    if "position" in clause and json.dumps(clause["position"]) not in allowed:
        raise SuiteError(f"{where} has the position {clause['position']!r}, not [relation, index of an earlier clause]")
