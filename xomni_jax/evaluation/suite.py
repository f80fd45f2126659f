"""What a suite (a benchmark) and a judge are.

Every suite takes the same path:

    load(data) -> items --model--> outputs (images or answers) --judge--> replies --score--> one record per item --aggregate--> results

A record holds integers, or values that are functions of one item alone, never an average over items. Items may therefore be judged
in any order, by any number of processes, in any number of sittings: `aggregate` sees every record once, sorted by id, and the result
file is the same to the byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image

Record = dict[str, Any]
_LONGEST_ID = 200  # bytes; most file systems take names of 255
Task = Literal["generate", "answer"]

# Name -> our wording. The official wordings stand in the official scorers (see each suite's docstring). To compare a score with an
# official one to the last digit, give the exact text in a file (xomni eval SUITE --instruction NAME=FILE).
INSTRUCTIONS = {
    "ocr": "Write down all text that is visible in this image. Give the text alone and do not repeat what you have already written. "
    "If the image holds no text, reply: No text recognized",
    "yes-no": "{question} Reply with one word, yes or no.",
    "word": "{question}\nAnswer the question using a single word or phrase.",
    "rewrite": "Rewrite this prompt for an image generator as one detailed English sentence. Keep every object, its number, its colour and "
    "its position exactly as they are, add no further objects, and describe setting, light and style. Prompt: {prompt}",
    "letter": "Reply with the letter of the right option and nothing else.",
    "match": "These are the options of a question:\n{options}\nSomebody answered: {answer}\nWhich option is meant? Reply with its letter "
    "alone, or with Z if the answer means none of them or more than one.",
    "wise": "This image was made from the prompt: {prompt}\nWhat it must show: {explanation}\nGrade it strictly with 0, 1 or 2 on three "
    "lines and write nothing else.\nConsistency: (does it show everything that is asked for?)\nRealism: (could it be a photograph?)\n"
    "Aesthetic Quality: (composition, colours and style)",
    "wise-verified": "This image was made from the prompt: {prompt}\nWhat it must show: {explanation}\nDoes the image show it, clearly "
    "enough to tell? Reply with one line: Score: 1 if it does, Score: 0 if it does not or you doubt it.",
}


class SuiteError(ValueError):
    """Data, outputs or judges that do not fit. One sentence: what, where (file and line), what to do."""


class JudgeUnavailable(SuiteError):
    """A judge does not answer. No score is made up: what is judged stays, and the same command continues later."""


@dataclass(frozen=True)
class Item:
    """One prompt or one question.

    Attributes:
      id: unique within the suite, as published; the key of everything that is stored.
      prompt: what the model is given: the text to draw, or the question.
      fields: JSON values for scoring and for the report, which groups items by "category".
      image: opens the image that the question is about; None where an image is to be drawn. Raises SuiteError when it is missing;
        `check_images` finds that out before a model is loaded.
    """

    id: str
    prompt: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    image: Callable[[], Image.Image] | None = None


class Wordings(dict[str, str]):
    """Instruction -> text. `used` holds the instructions that were read, so that a result can say which wordings decided it."""

    def __init__(self, wordings: Mapping[str, str]):
        super().__init__(wordings)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.used.add(name)
        return super().__getitem__(name)


class Suite:
    """One benchmark. A subclass sets the attributes that differ and defines `load`, `score` and `aggregate`.

    Attributes:
      name: as typed on the command line. title: as in the paper's tables.
      task: "generate": images are drawn from prompts; "answer": questions about images are answered.
      repeats: outputs per item (images per prompt); 1 for answers.
      judge: the kind of judge that looks at the images: "ocr", "detector", "contours", "vqa", "chat" or "measure"; None
        where local rules score.
      official_judge: what judged the published numbers, where its kind does not say it.
      fallback: the kind of judge that may be asked about answers which local rules cannot read, see `undecided`; None for no kind.
      size: height and width of the images in pixels, if the suite fixes them; None: the user's choice.
      max_new_tokens: of an answer.
      published: number of items in the published data; 0 where it is not known for sure.
      paper_scale: the headline times this is what the paper's tables print.
      files: what the data directory must hold and where to get it, for --help and for the error when it is missing.
      switches: names of deliberate departures from the official scorer -> what they do; all are off by default.
    """

    name: str = ""
    title: str = ""
    task: Task = "generate"
    repeats: int = 1
    judge: str | None = None
    fallback: str | None = None
    official_judge: str = ""
    size: tuple[int, int] | None = None
    max_new_tokens: int = 0
    published: int = 0
    paper_scale: float = 1.0
    files: str = ""
    switches: Mapping[str, str] = {}

    def __init__(self, name: str = "", switches: Iterable[str] = (), instructions: Mapping[str, str] | None = None):
        """Args: `switches` are those that are on; `instructions` replace wordings of `INSTRUCTIONS`.

        Raises:
          SuiteError: a switch or an instruction does not exist.
        """
        self.name = name or self.name or type(self).__name__
        self.title = self.title or self.name
        self.on, self.instructions = frozenset(switches), Wordings(INSTRUCTIONS | dict(instructions or {}))
        for switch in switches:
            if switch not in self.switches:
                raise SuiteError(f"{self.name} has no switch {switch!r}; it has {', '.join(self.switches) or 'none'}")
        for instruction, text in self.instructions.items():
            if instruction not in INSTRUCTIONS or not text.strip():
                raise SuiteError(f"there is no instruction {instruction!r}, or its text is empty; there are {', '.join(INSTRUCTIONS)}")

    def load(self, data: Path) -> list[Item]:
        """Items of a data directory, in published order. Raises SuiteError."""
        raise NotImplementedError

    def questions(self, item: Item) -> Sequence[Any]:
        """What the judge is asked about each output of an item: one JSON value per reply."""
        return ()

    def undecided(self, item: Item, answer: str) -> Mapping[str, Any] | None:
        """What a judge of the kind `fallback` is asked about an answer that local rules cannot read; None where they can.

        The reply, one of the question's "answers", is scored in place of the answer.
        """
        return None

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """The record of an item: JSON values, among them

        "score" (0 to 1, for sorting and paired comparisons), "verdicts" (a short text per output, for readers), "unparsed" (how many
        replies could not be read), the integers that `aggregate` adds, and for text suites "read" (what was read in each output).

        Args:
          outputs: one entry per repeat: the judge's replies in the order of `questions`, or the model's answer as a string.
        """
        raise NotImplementedError

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Records sorted by item id, each with its item's "id" and "fields" -> the suite's numbers, as the official scorer prints them:

        {"headline": name, "scores": {name: value}, "categories": {category: {"score": value, "items": n}}}, and optionally "notes":
        sentences that the report must show, such as what was left out.
        """
        raise NotImplementedError

    def keys(self, seed: int, ids: Sequence[str], repeats: int, purpose: int) -> Any:
        """Random keys [P, R] of P items and their repeats; `purpose` is that of `sampling.keys`."""
        from xomni_jax.sampling.keys import item_keys

        return item_keys(seed, self.name, ids, repeats, purpose)

    # ---- layout of the images on disk; the default is one file per image, {id}_{k}.png with k from 0 ----
    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        """Writes the images of one item, in the order of repeats, as the official scorer expects them."""
        for k, image in enumerate(images):
            write_image(directory / f"{item.id}_{k}.png", image)

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        """The images of an item, whoever drew them. Raises SuiteError naming the missing file."""
        return [read_drawn(directory / f"{item.id}_{k}.png") for k in range(self.repeats)]


class GridLayout(Suite):
    """{id}{suffix}: the images of one item as `tiles` of a square."""

    suffix = ".png"

    def file(self, item: Item) -> str:
        """The grid's path below the folder of images."""
        return item.id + self.suffix

    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        side, (width, height) = math.isqrt(self.repeats), images[0].size
        grid = Image.new("RGB", (side * width, side * height))
        for k, image in enumerate(images):
            grid.paste(image, (k % side * width, k // side * height))
        write_image(directory / self.file(item), grid)

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        return tiles(read_drawn(directory / self.file(item)), self.repeats)


def tiles(grid: Image.Image, number: int) -> list[Image.Image]:
    """The images of a square grid, row by row; each is width // columns by height // rows."""
    side = math.isqrt(number)
    width, height = grid.width // side, grid.height // side
    corners = [(k % side * width, k // side * height) for k in range(number)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def unreadable(why: str) -> dict[str, str]:
    """The reply of a judge that answered nothing that can be read."""
    return {"unreadable": why}


def is_unreadable(reply: Any) -> bool:
    """Whether a reply was made by `unreadable`."""
    return isinstance(reply, dict) and set(reply) == {"unreadable"}


class Judge(Protocol):
    """What answers a suite's `questions` about images; made by `judges.open_judge`.

    Attributes:
      name: for the result file, such as "pp-ocr" or the name of a model.
      settings: JSON values that belong beside a score, such as the model's version; no address, so that the same judge elsewhere gives
        the same file.
      concurrency: optional; questions that it can work on at a time, from several threads; 1 without it.
      batch: optional; items that it wants in one call of `ask`; 1 without it.
    """

    name: str
    settings: dict[str, Any]

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One list of replies per image, in the order of its questions; a reply without an answer is `unreadable(why)`.

        Raises:
          JudgeUnavailable: there are no replies, or malformed ones.
        """
        ...

    def close(self) -> None:
        """Frees connections and models, if there are any."""


def is_there(item: Item) -> bool:
    """Whether the image of an item exists, without reading it; True where that cannot be told."""
    return getattr(item.image, "exists", lambda: True)()


def check_id(id: str, where: str) -> None:
    """Raises SuiteError unless files can be named after the id: an item's files lie inside the folder of the run."""
    if not id.isprintable() or id in ("", ".", "..") or set(id) & set("/\\") or len(id.encode()) > _LONGEST_ID:
        raise SuiteError(f"{where}: the id {id[:80]!r} cannot be part of a file name; use letters, digits, - and _ ({_LONGEST_ID} at most)")


def check_images(items: Sequence[Item]) -> None:
    """Raises SuiteError with the number of missing images and the first of them. Reads no image."""
    missing = [item for item in items if not is_there(item)]
    if missing:
        raise SuiteError(f"{len(missing)} of {len(items)} images are missing; the first is {missing[0].image}")


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG or lossless WebP file; it gets its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    image.convert("RGB").save(part, path.suffix[1:].upper(), lossless=True)  # PNG takes no notice of lossless
    os.replace(part, path)


def read_drawn(path: Path) -> Image.Image:
    """A drawn image, RGB. Raises SuiteError when the file is missing or broken."""
    if not path.is_file():
        raise SuiteError(f"the image {path} is missing; draw it with --phase generate, or put it there")
    try:
        return read_image(path)
    except UnreadableImage as error:
        raise SuiteError(f"the image {path} cannot be read: {error}; delete it and draw it again") from error
