"""DocVQA, validation split: ANLS, an edit similarity that is 0 below one half. Greedy, 32 new tokens.

Distances are between the normalised strings (stripped, lower-cased, white space collapsed), lengths those of the original ones: a
quirk that is part of the metric. The reply reaches the metric stripped, as in lmms-eval. The test split's answers are only on the
challenge server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.reading import QuestionTable, Row
from xomni_jax.evaluation.suites.scoring import group_by, mean

_LEAST = 0.5


class DocVQA(QuestionTable):
    """docvqa."""

    title = "DocVQA"
    max_new_tokens = 32
    files = "DocVQA/validation-*.parquet of the Hugging Face dataset lmms-lab/DocVQA, or VLMEvalKit's DocVQA_VAL.tsv"
    folders = ("DocVQA", "docvqa")
    patterns = ("DocVQA/validation-*.parquet", "validation-*.parquet", "DocVQA_VAL.tsv")

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        """See QuestionTable."""
        if not row.values.get("answers") and not row.values.get("answer"):
            raise SuiteError(f"{row.where}: there are no answers; those of the test split are not public, use the validation split")
        answers = row.strings("answers", "answer", spelled=True)
        types = row.get("question_types", kind=list, default=[])
        fields = {"category": str(types[0]) if types else "all", "types": [str(t) for t in types], "answers": answers}
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
    return 0.0 if best < _LEAST else best


def _distance(answer: str, reply: str) -> float:
    distance = Levenshtein.distance(*(" ".join(text.strip().lower().split()) for text in (answer, reply)))
    length = max(len(answer), len(reply))
    return distance / length if length else 0.0
