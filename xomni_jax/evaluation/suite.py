"""What a benchmark is to the runner: items to load, an output to make per item and repeat, questions for a judge, integers to add up.

The path of one suite, the same for all of them:

    load(data) -> items --model--> outputs (images or answers) --judge--> replies --score--> one record per item --aggregate--> results

A record holds integers (or a value that is a function of one item alone), never an average over items: items may be judged in any
order, by any number of processes, in any number of sittings, and `aggregate` sees them once, sorted by id. So the result file is the
same to the byte however the work was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

Record = dict[str, Any]
Replies = Sequence[Any]  # a judge's replies to the questions about one output, in their order
Task = Literal["generate", "answer"]


class SuiteError(ValueError):
    """Data, outputs or judges that do not fit. One sentence: what, where (file and line), what to do."""


class JudgeUnavailable(SuiteError):
    """A judge does not answer. Nothing is scored in its place: what has been answered stays, and the same command goes on later."""


@dataclass(frozen=True)
class Item:
    """One prompt or one question.

    Attributes:
      id: unique within the suite, as published; the key of everything that is stored.
      prompt: what the model is given: the text to draw, or the question.
      fields: JSON-able facts for scoring and the report; "category" is what the report groups by.
      image: opens the image that the question is about; None where images are to be drawn. SuiteError when it is missing;
        `check_images` finds that out before a model is loaded.
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
      task: "generate": images are drawn from prompts; "answer": questions about images are answered.
      repeats: outputs per item (images per prompt); 1 for answers.
      judge: "ocr", "detector", "contours" or "vqa" where outputs go to a judge; None where local rules read them.
      load: (data directory) -> items in published order. Raises SuiteError.
      questions: item -> what the judge is asked about each of its outputs, one JSON-able request per reply; () without a judge.
      score: (item, outputs) -> record. `outputs` holds one entry per repeat: the judge's replies, or the model's answer (a string).
        The record is JSON-able and has "score" (0 to 1, of this item, for sorting and paired comparisons), "verdicts" (one short
        text per repeat, for a reader) and the integers that `aggregate` adds; "unparsed" counts replies that could not be read.
        Text suites also give "read": what the judge read, one string per repeat.
      aggregate: records sorted by item id, each with its item's "id" and "fields" -> {"headline": name, "scores": {name: value},
        "categories": {category: {"score": value, "items": n}}}; values as the official scorer prints them.
        Optional: "notes", sentences that the report must show (what was left out, replies that could not be read).
      save: (directory, item, images in the order of repeats) -> writes the official layout of the images of one item.
      open: (directory, item) -> its images back from that layout, whoever drew them. SuiteError naming the missing file.
      size: height and width of the images where the suite says so; None: the user's choice.
      max_new_tokens: of an answer.
      published: items in the published data, so that a part is called a part; 0 where no count is known for sure.
      paper_scale: the headline times this is what the paper's tables print.
      files: what must lie in the data directory and where a user gets it, for --help and for the error when it is missing.
      switches: named departures from official quirks -> what they do; off by default, see `suites.get_suite`.
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
    open: Callable[[Path, Item], list[Image.Image]] | None = None
    size: tuple[int, int] | None = None
    max_new_tokens: int = 0
    published: int = 0
    paper_scale: float = 1.0
    files: str = ""
    switches: Mapping[str, str] = field(default_factory=dict)


class Judge(Protocol):
    """What answers the questions of a suite's `questions`; made by `judges.open_judge`.

    Attributes:
      name: for the result file, such as "pp-ocr" or the name of a model.
      settings: JSON-able facts that belong beside a score: version of the model, decoding, the judge that the benchmark names;
        no address, so that the same judge elsewhere gives the same file.
    """

    name: str
    settings: dict[str, Any]

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One list of replies per image, in the order of its questions. JudgeUnavailable when there is no answer.

        Give it a handful of items at a time and store what comes back: a batch is the unit that is lost with an interruption.
        """
        ...

    def close(self) -> None:
        """Free connections and models."""
        ...


def check_images(items: Sequence[Item]) -> None:
    """SuiteError with the number of missing images and the first of them. Reads no image."""
    missing = [item for item in items if item.image is not None and not getattr(item.image, "exists", lambda: True)()]
    if missing:
        raise SuiteError(f"{len(missing)} of {len(items)} images are missing; the first is {missing[0].image}")
