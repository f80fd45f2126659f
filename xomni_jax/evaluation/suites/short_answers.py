"""GQA and DocVQA: questions with short answers; one published table of questions and images each. Greedy.

GQA, testdev balanced: equal to the published answer after lower-casing and deleting ASCII punctuation (lmms-eval). VLMEvalKit only
lower-cases and strips; that reading of the same answers stands among the scores.

DocVQA, validation split: ANLS, an edit similarity that is 0 below one half. As in lmms-eval, distances are between normalised strings but
lengths those of the original ones.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import HUGGING_FACE, VLMEVALKIT, Download
from xomni_jax.evaluation.suites.reading import QuestionTable, Row, read_rows, rows_with_images, unique_items
from xomni_jax.evaluation.suites.scoring import group_by, mean, ratio, right_or_wrong, share_right

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LEAST_ANLS = 0.5


class GQA(QuestionTable):
    """gqa."""

    title = "GQA"
    max_new_tokens = 16
    downloads = (
        (
            Download(
                f"{HUGGING_FACE} lmms-lab/GQA", {"testdev_balanced_instructions/*.parquet": "", "testdev_balanced_images/*.parquet": ""}
            ),
        ),
        (Download(VLMEVALKIT, {"GQA_TestDev_Balanced.tsv": "md5:99b62f22e224d9b2f32dcbe41359d1c9"}),),
    )
    folders = ("GQA", "gqa")
    patterns = ("testdev_balanced_instructions/*.parquet", "GQA_TestDev_Balanced.tsv")

    def load(self, data: Path) -> list[Item]:
        """Questions with their images; the parquet form keeps the images in files of their own."""
        paths = self.find(data, *self.patterns)
        if paths[0].suffix == ".tsv":
            return super().load(data)
        stored = self.find(data, "testdev_balanced_images/*.parquet")
        images = {row.text("id"): image for row, image in rows_with_images(stored)}
        rows = list(read_rows(paths))
        missing = next((row for row in rows if row.text("imageId") not in images), None)
        if missing:
            raise SuiteError(f"{missing.where}: the image {missing.text('imageId')!r} is not in testdev_balanced_images; get {self.files}")
        return unique_items((self.item(row, images[row.text("imageId")]), row.where) for row in rows)

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        category = row.get("types", kind=dict, default={}).get("structural")
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


class DocVQA(QuestionTable):
    """docvqa."""

    title = "DocVQA"
    max_new_tokens = 32
    downloads = (
        (Download(f"{HUGGING_FACE} lmms-lab/DocVQA", {"DocVQA/validation-*.parquet": ""}),),
        (Download(VLMEVALKIT, {"DocVQA_VAL.tsv": "md5:d5ee77e1926ff10690d469c56b73eabf"}),),
    )
    folders = ("DocVQA", "docvqa")
    patterns = ("DocVQA/validation-*.parquet", "validation-*.parquet", "DocVQA_VAL.tsv")

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        if not row.values.get("answers") and not row.values.get("answer"):
            raise SuiteError(f"{row.where}: there are no answers; those of the test split are not public, use the validation split")
        answers = row.strings("answers", "answer", spelled=True)
        types = row.strings("question_types") if row.values.get("question_types") else []
        fields = {"category": types[0] if types else "all", "types": types, "answers": answers}
        return Item(row.text("questionId", "index"), self.instructions["word"].format(question=row.text("question")), fields, image)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """score: the ANLS of this question, a function of it alone."""
        answers, value = item.fields["answers"], anls(item.fields["answers"], outputs[0].strip())
        verdict = f"{value:.2f}, wanted {json.dumps(answers, ensure_ascii=False)}"
        return {"score": value, "verdicts": [verdict], "unparsed": 0}

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Mean over questions; a question of several types counts in each of their categories."""
        types = sorted({t for r in records for t in r["fields"]["types"]})
        groups = {t: [r for r in records if t in r["fields"]["types"]] for t in types} or group_by(records, "category")
        return {
            "headline": "ANLS",
            "scores": {"ANLS": mean(records, "score")},
            "categories": {name: {"score": mean(rows, "score"), "items": len(rows)} for name, rows in groups.items()},
        }


def anls(answers: Sequence[str], reply: str) -> float:
    """1 - the smallest normalised distance to an answer, 0 when that is below one half."""
    best = 1 - min(_distance(answer, reply) for answer in answers)
    return 0.0 if best < _LEAST_ANLS else best


def _distance(answer: str, reply: str) -> float:
    distance = Levenshtein.distance(*(" ".join(text.strip().lower().split()) for text in (answer, reply)))
    length = max(len(answer), len(reply))
    return distance / length if length else 0.0
