"""Questions about images of a folder with metadata.jsonl, as a suite of `xomni eval`; an answer is right when it is equal but for case.

Command: xomni eval configs/emoji/questions.py:Questions --model MODEL --data data/emoji/heldout_artist --out OUT
"""

import json

from xomni_jax.evaluation.suite import Item, Suite
from xomni_jax.evaluation.suites.images import FileImage
from xomni_jax.evaluation.suites.scoring import right_or_wrong, share_right


class Questions(Suite):
    """One item per row; categories are the questions."""

    title = "Questions about own images"
    task = "answer"
    max_new_tokens = 48
    files = "metadata.jsonl with columns file_name, question and answer, and the images"

    def load(self, data):
        """The rows of metadata.jsonl."""
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
        return [
            Item(
                f"{n:06}",
                row["question"],
                {"category": row["question"], "answer": row["answer"]},
                FileImage(data / row["file_name"], "make the set again"),
            )
            for n, row in enumerate(rows)
        ]

    def score(self, item, outputs):
        """right: 0 or 1."""
        wanted = item.fields["answer"]
        return right_or_wrong(outputs[0].strip().lower() == wanted.lower(), f"wanted {wanted}")

    def aggregate(self, records):
        """Share of right answers, over all questions and for each."""
        return share_right(records, "exact match")
