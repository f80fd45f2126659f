"""OCRBench (Yuliang-Liu/MultimodalOCR): 1000 questions about text in images, a point for each answer found in the reply.

The question is the prompt; at most 128 new tokens (lmms-eval; the original script takes 100). An answer counts when it is a substring
of the reply, so "42" is found in "1420"; for handwritten formulas (HME100k) case matters and spaces go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.images import FileImage
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import ratios_by, right_or_wrong

FORMULAS = "HME100k"
_REPOSITORY = f"{GITHUB} Yuliang-Liu/MultimodalOCR"
_QUESTIONS = {"OCRBench.json": "296682 sha256:df75957e75ea052e9f38f2c67a4f6676103998517345cf49ef7d03b62c835864"}
_IMAGES = {"OCRBench_Images/*/*": ""}
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


class OCRBench(PublishedSuite):
    """ocrbench."""

    title = "OCRBench"
    task = "answer"
    max_new_tokens = 128
    published = 1000
    folders = ("ocrbench", "OCRBench")
    downloads = (
        (
            Download(f"{_REPOSITORY}, folder OCRBench/OCRBench", _QUESTIONS),
            Download(_REPOSITORY, _IMAGES, "an archive linked in its folder OCRBench, unpacked beside OCRBench.json"),
        ),
    )
    switches = {"half-width": "fold full-width ASCII to half-width in answers and replies, as current versions of lmms-eval do"}

    def load(self, data: Path) -> list[Item]:
        """Items of OCRBench.json; `id` repeats between its source datasets, so the dataset's name is put before it."""
        (path,) = self.find(data, "OCRBench.json")
        folder = next((f for f in (path.parent / "OCRBench_Images", path.parent / "images") if f.is_dir()), path.parent)
        return unique_items((self._item(row, folder), row.where) for row in read_rows(path))

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: 0 or 1."""
        right = is_right(item.fields["dataset"], item.fields["answers"], outputs[0], "half-width" in self.on)
        wanted = json.dumps(item.fields["answers"], ensure_ascii=False)
        return right_or_wrong(right, f"wanted {wanted}")

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Points: one per right answer, out of 1000 when the data is complete; categories are shares."""
        points = sum(r["right"] for r in records)
        scores = {"points": points, "accuracy": points / len(records)}
        return {"headline": "points", "scores": scores, "categories": ratios_by(records, "category", "right", "one")}

    def _item(self, row: Row, folder: Path) -> Item:
        answers = row.strings("answers")
        if not all(a.strip() for a in answers):
            raise row.wrong("answers", "holds an empty answer, which would be found in every reply")
        dataset = row.text("dataset_name")
        image = FileImage(row.file("image_path", folder), f"get it with {self.files}")
        fields = {"category": row.text("type"), "dataset": dataset, "answers": answers}
        return Item(f"{dataset}-{row.number('id'):05d}", row.text("question"), fields, image)


def is_right(dataset: str, answers: Sequence[str], reply: str, half_width: bool = False) -> bool:
    """Whether any answer stands in the reply."""
    if half_width:
        reply, answers = reply.translate(_HALF_WIDTH), [a.translate(_HALF_WIDTH) for a in answers]

    def plain(text: str) -> str:
        if dataset == FORMULAS:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return any(plain(answer) in plain(reply) for answer in answers)
