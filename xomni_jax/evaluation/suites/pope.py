"""POPE (RUCAIBox/POPE): is there a chair in the image? Three splits of 3000 questions that differ in how absent objects were drawn.

Headline: the mean over the splits of the official F1 of "yes". The readings of the replies by lmms-eval and VLMEvalKit are computed
from the same answers and stand among the scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.images import FileImage
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import group_by, mean

SPLITS = ("random", "popular", "adversarial")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'  # which VLMEvalKit removes, beside full stops; others, such as * and :, stay part of a word
_FULL_STOPS = 32  # of which it removes the first so many: a flag stands where the count belongs


class POPE(PublishedSuite):
    """pope."""

    title = "POPE"
    task = "answer"
    max_new_tokens = 128
    published = 9000
    paper_scale = 100.0
    folders = ("pope", "output/coco")
    downloads = (
        (
            Download(
                f"{GITHUB} RUCAIBox/POPE, folder output/coco",
                {
                    "coco_pope_random.json": "368166 sha256:ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
                    "coco_pope_popular.json": "370190 sha256:72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
                    "coco_pope_adversarial.json": "370401 sha256:420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
                },
            ),
            Download("validation images of COCO 2014", {"val2014/COCO_val2014_*.jpg": ""}, "500 of them are asked about"),
        ),
    )
    switches = {"single-word": "append lmms-eval's request for a single word or phrase to each question"}

    def load(self, data: Path) -> list[Item]:
        """All questions; the id is the split and question_id, which alone repeats between the splits."""
        template = self.instructions["word"] if "single-word" in self.on else "{question}"
        items = []
        for split in SPLITS:
            (path,) = self.find(data, f"coco_pope_{split}.json")
            folder = next((f for f in (data / "val2014", path.parent / "val2014") if f.is_dir()), path.parent)
            items += [(_item(row, split, folder, template), row.where) for row in read_rows(path)]
        return unique_items(items)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """For each way of reading the reply [true positive, false positive, true negative, false negative]."""
        label, read = item.fields["label"], {name: reader(outputs[0]) for name, reader in _READERS.items()}
        right, undecided = read["official"] == label, read["VLMEvalKit"] == "unknown"
        counts = {name: _counts(label, answer) for name, answer in read.items()}
        if undecided and label == "yes":
            counts["VLMEvalKit"] = [0, 0, 0, 1]  # lmms-eval would leave such an answer out of the recall as well
        verdict = f"{'right' if right else 'wrong'}: read as {read['official']}" + (", though it says neither or both" if undecided else "")
        return {"score": float(right), "counts": counts, "undecided": int(undecided), "verdicts": [verdict], "unparsed": 0}

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Mean F1 and accuracy over the splits, the numbers of each split, and the other readings."""
        splits = group_by(records, "category")
        by_split = {split: metrics(rows, "official") for split, rows in splits.items()}
        scores = {}
        for reader in _READERS:
            found = [metrics(rows, reader) for rows in splits.values()]
            suffix = "" if reader == "official" else f" ({reader})"
            scores |= {f"mean {name}{suffix}": mean(found, name) for name in ("F1", "accuracy")}
        scores |= {f"{name}, {split}": value for split, m in by_split.items() for name, value in m.items()}
        categories = {split: {"score": by_split[split]["F1"], "items": len(rows)} for split, rows in splits.items()}
        return {"headline": "mean F1", "scores": scores, "categories": categories, "notes": _notes(records, splits)}


def official(answer: str) -> str:
    """yes or no by the official parser; nothing is undecided."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def lmms_eval(answer: str) -> str:
    """The reply as lmms-eval compares it with the label; other words than yes and no are neither."""
    return answer.lower().strip()


def vlmevalkit(answer: str) -> str:
    """yes or no when one of the words stands in the reply and the other does not, else unknown.

    A sign is replaced by a space, or deleted when the reply has it next to a space or has a comma between digits anywhere.
    """
    answer = answer.lower()
    plain, grouped = answer, re.search(r"\d,\d", answer)
    for sign in _SIGNS:
        plain = plain.replace(sign, "" if grouped or f"{sign} " in answer or f" {sign}" in answer else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", plain, count=_FULL_STOPS).split()
    yes, no = "yes" in words, "no" in words
    return "unknown" if yes == no else "yes" if yes else "no"


_READERS: dict[str, Callable[[str], str]] = {"official": official, "lmms-eval": lmms_eval, "VLMEvalKit": vlmevalkit}


def _counts(label: str, answer: str) -> list[int]:
    """[true positive, false positive, true negative, false negative]; all 0 for an answer that is neither yes nor no."""
    return [int((label, answer) == case) for case in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))]


def metrics(records: Sequence[Record], reader: str) -> dict[str, float]:
    """F1, accuracy, precision and recall of yes, and the yes ratio (of the answers; lmms-eval takes it of the labels).

    A ratio whose divisor is 0 is 0, where the official scorer stops with an error.
    """
    tp, fp, tn, fn = (sum(r["counts"][reader][k] for r in records) for k in range(4))
    precision, recall = _share(tp, tp + fp), _share(tp, tp + fn)
    labels = sum(r["fields"]["label"] == "yes" for r in records)
    return {
        "F1": _share(2 * precision * recall, precision + recall),
        "accuracy": (tp + tn) / len(records),
        "precision": precision,
        "recall": recall,
        "yes ratio": (labels if reader == "lmms-eval" else tp + fp) / len(records),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _notes(records: Sequence[Record], splits: dict[str, list[Record]]) -> list[str]:
    without = [split for split, rows in splits.items() if not any(r["counts"]["official"][0] for r in rows)]
    notes = [f"The official scorer divides by 0 in {split}: nothing was right or asked with yes." for split in without]
    missing = [s for s in SPLITS if s not in splits]
    notes += [f"Without {', '.join(missing)}: the mean is over {', '.join(splits)}."] if missing else []
    undecided = sum(r["undecided"] for r in records)
    return notes + ([f"{undecided} answers say neither yes nor no, or both; the official parser decides them."] if undecided else [])


def _item(row: Row, split: str, folder: Path, template: str) -> Item:
    label, question = row.text("label"), row.text("text")
    if label not in ("yes", "no"):
        raise row.wrong("label", f"is {label!r}, not yes or no")
    image = FileImage(row.file("image", folder), "a COCO 2014 validation image; its folder val2014 belongs into the data directory")
    fields = {"category": split, "label": label}
    return Item(f"{split}-{row.number('question_id'):05d}", template.format(question=question), fields, image)
