"""GQA, testdev balanced: short answers compared with the one published answer, no synonyms and no articles.

Equal after lower-casing and deleting ASCII punctuation (lmms-eval): "tank-top" becomes "tanktop" and is not "tank top". VLMEvalKit
lower-cases and strips only; that reading of the same answers stands among the scores. Greedy, 16 new tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, Suite, SuiteError
from xomni_jax.evaluation.suites.choices import Choices
from xomni_jax.evaluation.suites.reading import Row, check_unique, find, read_rows
from xomni_jax.evaluation.suites.sums import ratio, right_or_wrong, share_right
from xomni_jax.evaluation.suites.tables import rows_with_images

FILES = (
    "the folders testdev_balanced_instructions and testdev_balanced_images (parquet) of the Hugging Face dataset lmms-lab/GQA, "
    "or VLMEvalKit's GQA_TestDev_Balanced.tsv"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def suite(name: str, choices: Choices) -> Suite:
    """gqa."""
    return Suite(
        name=name,
        title="GQA",
        task="answer",
        load=lambda data: load(data, choices.instruction("word")),
        score=score,
        aggregate=aggregate,
        max_new_tokens=16,
        paper_scale=100.0,
        files=FILES,
    )


def load(data: Path, template: str) -> list[Item]:
    """Questions with their images, from either published form."""
    patterns = ("testdev_balanced_instructions/*.parquet", "GQA_TestDev_Balanced.tsv")
    paths = find(data, ("GQA", "gqa"), patterns, FILES)
    if paths[0].suffix == ".tsv":
        return check_unique([(_item(row, image, template), row.where) for row, image in rows_with_images(paths)])
    stored = find(data, ("GQA", "gqa"), ("testdev_balanced_images/*.parquet",), FILES)
    images = {row.text("id"): image for row, image in rows_with_images(stored)}
    rows = list(read_rows(paths))
    missing = next((row for row in rows if row.text("imageId") not in images), None)
    if missing:
        raise SuiteError(f"{missing.where}: the image {missing.text('imageId')!r} is not in testdev_balanced_images; get {FILES}")
    return check_unique([(_item(row, images[row.text("imageId")], template), row.where) for row in rows])


def equal(answer: str, reply: str) -> bool:
    """Whether the reply is the answer as lmms-eval compares them."""
    return answer.lower().translate(_PUNCTUATION) == reply.lower().translate(_PUNCTUATION)


def score(item: Item, outputs: Sequence[Any]) -> Record:
    """right and stripped: 0 or 1 by the two ways of comparing. The answer reaches both stripped."""
    answer, reply = item.fields["answer"], outputs[0].strip()
    return right_or_wrong(equal(answer, reply), f"wanted {answer}") | {"stripped": int(answer.lower().strip() == reply.lower())}


def aggregate(records: Sequence[Record]) -> dict[str, Any]:
    """Exact match, over all questions and by their structural type."""
    found = share_right(records, "exact match")
    found["scores"]["exact match (VLMEvalKit)"] = ratio(records, "stripped", "one")
    return found


def _item(row: Row, image: Callable[[], Any], template: str) -> Item:
    types = row.values.get("types")
    category = types.get("structural") if isinstance(types, dict) else None
    fields = {"category": str(category or "all"), "answer": row.text("answer")}
    return Item(row.text("id", "index"), template.format(question=row.text("question")), fields, image)
