"""SEED-Bench, image part: four options, the first character of the reply decides (lmms-eval).

"B." and "b" are right, "(B)" and "The answer is B" are wrong. `vlmevalkit` extracts the letter with VLMEvalKit's rules instead, without
rotations. Rows of videos are left out. The closing request for a letter is worded by us (see choices.INSTRUCTIONS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, Suite, SuiteError
from xomni_jax.evaluation.suites import letters
from xomni_jax.evaluation.suites.choices import Choices
from xomni_jax.evaluation.suites.reading import Row, check_unique, find
from xomni_jax.evaluation.suites.sums import right_or_wrong, share_right, unparsed_notes
from xomni_jax.evaluation.suites.tables import rows_with_images

FILES = "data/test-*.parquet of the Hugging Face dataset lmms-lab/SEED-Bench, or VLMEvalKit's SEEDBench_IMG.tsv"
SWITCHES = {"vlmevalkit": "VLMEvalKit's extraction of the letter instead of the first character"}


def suite(name: str, choices: Choices) -> Suite:
    """seedbench."""
    return Suite(
        name=name,
        title="SEED-Bench image",
        task="answer",
        load=lambda data: load(data, choices.instruction("letter")),
        score=lambda item, outputs: score(item, outputs, choices.on("vlmevalkit")),
        aggregate=aggregate,
        max_new_tokens=16,
        paper_scale=100.0,
        files=FILES,
        switches=SWITCHES,
    )


def load(data: Path, request: str) -> list[Item]:
    """The image questions of either published form."""
    paths = find(data, ("SEED-Bench", "seedbench"), ("data/test-*.parquet", "test-*.parquet", "SEEDBench_IMG.tsv"), FILES)
    rows = ((row, image) for row, image in rows_with_images(paths) if row.get("data_type", default="image") == "image")
    return check_unique([(_item(row, image, request), row.where) for row, image in rows])


def first_character(reply: str) -> str:
    """What lmms-eval takes for the answer; "" of an empty reply."""
    return reply.strip()[:1]


def score(item: Item, outputs: Sequence[Any], vlmevalkit: bool = False) -> Record:
    """right: 0 or 1. Only the switch's extraction can be undecided."""
    chosen = letters.vlmevalkit(outputs[0], item.fields["options"]) if vlmevalkit else first_character(outputs[0])
    wanted = item.fields["answer"]
    right = (chosen or "").lower() == wanted.lower()
    return right_or_wrong(right, f"{chosen or 'nothing'!r}, wanted {wanted}", vlmevalkit and chosen is None)


def aggregate(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, over all questions and by their type."""
    return share_right(records, "accuracy") | {"notes": unparsed_notes(records, "wrong")}


def _item(row: Row, image: Callable[[], Any], request: str) -> Item:
    options = {letter: row.text(f"choice_{letter.lower()}", letter) for letter in "ABCD"}
    answer, question = row.text("answer").strip().upper(), row.text("question")
    if answer not in options:
        raise SuiteError(f"{row.where}: the answer {answer!r} is not one of A to D")
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    category = row.get("question_type_id", "category", kind=(str, int), default="all")
    fields = {"category": str(category), "options": options, "answer": answer}
    return Item(row.text("question_id", "index"), f"{question}\n{listed}\n{request}", fields, image)
