"""GQA, testdev balanced: short answers compared with the one published answer, no synonyms and no articles.

Equal after lower-casing and deleting ASCII punctuation (lmms-eval): "tank-top" becomes "tanktop" and is not "tank top". VLMEvalKit
lower-cases and strips only; that reading of the same answers stands among the scores. Greedy, 16 new tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.reading import QuestionTable, Row, find, read_rows, rows_with_images, unique_items
from xomni_jax.evaluation.suites.scoring import ratio, right_or_wrong, share_right

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQA(QuestionTable):
    """gqa."""

    title = "GQA"
    max_new_tokens = 16
    files = (
        "the folders testdev_balanced_instructions and testdev_balanced_images (parquet) of the Hugging Face dataset lmms-lab/GQA, "
        "or VLMEvalKit's GQA_TestDev_Balanced.tsv"
    )
    folders = ("GQA", "gqa")
    patterns = ("testdev_balanced_instructions/*.parquet", "GQA_TestDev_Balanced.tsv")

    def load(self, data: Path) -> list[Item]:
        """Questions with their images; the parquet form keeps the images in files of their own."""
        paths = find(data, self.folders, self.patterns, self.files)
        if paths[0].suffix == ".tsv":
            return super().load(data)
        stored = find(data, self.folders, ("testdev_balanced_images/*.parquet",), self.files)
        images = {row.text("id"): image for row, image in rows_with_images(stored)}
        rows = list(read_rows(paths))
        missing = next((row for row in rows if row.text("imageId") not in images), None)
        if missing:
            raise SuiteError(f"{missing.where}: the image {missing.text('imageId')!r} is not in testdev_balanced_images; get {self.files}")
        return unique_items((self.item(row, images[row.text("imageId")]), row.where) for row in rows)

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        """See QuestionTable."""
        types = row.values.get("types")
        category = types.get("structural") if isinstance(types, dict) else None
        fields = {"category": str(category or "all"), "answer": row.text("answer")}
        return Item(row.text("id", "index"), self.instructions["word"].format(question=row.text("question")), fields, image)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right and stripped: 0 or 1 by the two ways of comparing. The answer reaches both stripped."""
        answer, reply = item.fields["answer"], outputs[0].strip()
        return right_or_wrong(equal(answer, reply), f"wanted {answer}") | {"stripped": int(answer.lower().strip() == reply.lower())}

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Exact match, over all questions and by their structural type."""
        found = share_right(records, "exact match")
        found["scores"]["exact match (VLMEvalKit)"] = ratio(records, "stripped", "one")
        return found


def equal(answer: str, reply: str) -> bool:
    """Whether the reply is the answer as lmms-eval compares them."""
    return answer.lower().translate(_PUNCTUATION) == reply.lower().translate(_PUNCTUATION)
