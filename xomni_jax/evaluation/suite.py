"""What a benchmark is to the runner: items to load, an output to make per item and repeat, questions for a judge, integers to add up.

The path of one suite, the same for all of them:

    load(data) -> items --model--> outputs (pictures or answers) --judge--> replies --score--> one record per item --aggregate--> results

A record holds integers (or a value that is a function of one item alone), never an average over items: items may be judged in any
order, by any number of processes, in any number of sittings, and `aggregate` sees them once, sorted by id. So the result file is the
same to the byte however the work was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

Record = dict[str, Any]
Replies = Sequence[Any]  # a judge's replies to the questions about one output, in their order
Task = Literal["generate", "answer"]


class SuiteError(ValueError):
    """Data, outputs or judges that do not fit. One sentence: what, where (file and line), what to do."""


@dataclass(frozen=True)
class Item:
    """One prompt or one question.

    Attributes:
      id: unique within the suite, as published; the key of everything that is stored.
      prompt: what the model is given: the text to draw, or the question.
      fields: JSON-able facts for scoring and the report; "category" is what the report groups by.
      image: opens the picture that the question is about; None where pictures are to be drawn.
    """

    id: str
    prompt: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    image: Callable[[], Image.Image] | None = None


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
      name: as typed on the command line. title: as in the paper's tables.
      task: "generate": pictures are drawn from prompts; "answer": questions about pictures are answered.
      repeats: outputs per item (images per prompt); 1 for answers.
      judge: "ocr", "detector" or "vqa" where outputs go to a judge; None where local rules read them.
      load: (data directory) -> items in published order. Raises SuiteError.
      questions: item -> what the judge is asked about each of its outputs, one JSON-able request per reply; () without a judge.
      score: (item, outputs) -> record. `outputs` holds one entry per repeat: the judge's replies, or the model's answer (a string).
        The record is JSON-able and has "score" (0 to 1, of this item, for sorting and paired comparisons), "verdicts" (one short
        text per repeat, for a reader) and the integers that `aggregate` adds; "unparsed" counts replies that could not be read.
      aggregate: records sorted by item id, each with its item's "id" and "fields" -> {"headline": name, "scores": {name: value},
        "categories": {category: {"score": value, "items": n}}}; values as the official scorer prints them.
      save: (directory, item, pictures in the order of repeats) -> writes the official layout of the pictures of one item.
      max_new_tokens: of an answer.
      files: what must lie in the data directory and where a user gets it, for --help and for the error when it is missing.
      switches: named departures from official quirks -> what they do; off by default, see `with_switches`.
    """

    name: str
    title: str
    task: Task
    load: Callable[[Path], list[Item]]
    score: Callable[[Item, Sequence[Any]], Record]
    aggregate: Callable[[Sequence[Record]], dict[str, Any]]
    repeats: int = 1
    judge: str | None = None
    questions: Callable[[Item], Sequence[Any]] = lambda item: ()
    save: Callable[[Path, Item, Sequence[Image.Image]], None] | None = None
    max_new_tokens: int = 0
    files: str = ""
    switches: Mapping[str, str] = field(default_factory=dict)
