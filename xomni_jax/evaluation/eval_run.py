"""A finished run of a suite, read from its directory: results.json, items.jsonl, and the images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.data.images import read_image
from xomni_jax.evaluation.suite import SuiteError

Item = dict[str, Any]  # a line of items.jsonl
MAKE_ONE = "make a run first: xomni eval SUITE --model MODEL --data DATA --out RUN (xomni eval --help)"
NOT_FINISHED = "the run is not finished; give the command that began it again, it goes on from there"
# option of the command line -> the setting it becomes
DRAWN = {name: name for name in ("height", "width", "seed")}
DRAWN |= {name: f"sampling.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "guidance")}


@dataclass(frozen=True)
class ImageRef:
    """An image: a file, or tile `k` of a file that holds side x side of them, row by row, or what `opener` opens."""

    path: Path
    k: int = 0
    side: int = 1
    opener: Callable[[], Image.Image] | None = field(default=None, compare=False)

    @property
    def exists(self) -> bool:
        """Whether it can be opened."""
        return self.opener is not None or self.path.is_file()

    def open(self) -> Image.Image:
        """The image, RGB."""
        if self.opener is not None:
            return self.opener().convert("RGB")
        whole = read_image(self.path)
        width, height = whole.width // self.side, whole.height // self.side
        x, y = self.k % self.side * width, self.k // self.side * height
        return whole.crop((x, y, x + width, y + height))


@dataclass(frozen=True)
class EvalRun:
    """What a run measured.

    Attributes:
      items: the lines of items.jsonl, sorted by id.
      question_images: item id -> opens the image that its question is about, where available.
    """

    path: Path
    results: dict[str, Any]
    items: list[Item]
    question_images: Mapping[str, Callable[[], Image.Image]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decided the outputs; empty where another program drew the images."""
        return self.results.get("settings") or {}

    @property
    def flat_settings(self) -> dict[str, Any]:
        """Settings, judge, switches and wordings on one level, such as "sampling.guidance" and "judge.name"."""
        judge = self.results.get("judge") or {"name": "local rules"}
        choices = {"switches": self.results.get("switches") or "none", "instruction": self.results.get("instructions") or {}}
        return flat(self.settings | {"judge": judge} | choices)

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return self.results["suite"]

    @property
    def name(self) -> str:
        """Name for readers: that of its folder."""
        return self.path.name or str(self.path)

    @property
    def scores(self) -> np.ndarray:
        """Score per item, 0 to 1, NaN where there is none."""
        return np.array([np.nan if item.get("score") is None else item["score"] for item in self.items], np.float64)

    @property
    def categories(self) -> list[str]:
        """Category per item; "" where the suite has none."""
        return [category(item) for item in self.items]

    @property
    def published_order(self) -> list[int]:
        """Numbers of the items in the order of the benchmark's data."""
        return sorted(range(len(self.items)), key=lambda i: self.items[i].get("position", i))


def read_eval_run(directory: str | Path, remedy: str = MAKE_ONE) -> EvalRun:
    """The run in a directory.

    Raises:
      SuiteError: no run here or not finished, said with the `remedy`, or a damaged file.
    """
    path = Path(directory)
    if not (path / "results.json").is_file():
        begun = path.is_dir() and any((path / name).is_dir() for name in ("parts", "judged"))
        raise SuiteError(f"{path}: {NOT_FINISHED if begun else f'no results.json here; {remedy}'}")
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        missing = {"suite", "title", "headline", "scores", "categories"} - set(results)
    except (ValueError, TypeError):
        raise SuiteError(f"{path / 'results.json'}: not JSON; {NOT_FINISHED}") from None
    if missing:
        raise SuiteError(f"{path / 'results.json'}: has no {min(missing)!r}, so it is not from xomni eval SUITE; {remedy}")
    items = []
    with (path / "items.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                items.append(json.loads(line))
                items[-1]["id"], items[-1]["prompt"], items[-1]["fields"], items[-1]["verdicts"], items[-1]["record"]
            except (ValueError, TypeError, KeyError):
                raise SuiteError(f"{path / 'items.jsonl'}, line {number}: no complete item; {NOT_FINISHED}") from None
    if not items:
        raise SuiteError(f"{path / 'items.jsonl'}: no items; {NOT_FINISHED}")
    return EvalRun(path, results, sorted(items, key=lambda item: item["id"]))


def command(suite: str, out: str | Path, settings: Mapping[str, Any], **changes: Any) -> str:
    """The command line that makes a run with the settings of another one, some of them changed."""
    known = flat(settings)
    given = {"model": known.get("model.path", "MODEL"), "data": known.get("data.path") or "DATA"}
    given |= {"adapter": known["model.adapter"]} if "model.adapter" in known else {}
    given |= {"rewrite": "SOURCE"} if known.get("data.rewritten") else {}
    given |= {name: known[at] for name, at in DRAWN.items() if at in known} | changes
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return f"xomni eval {suite} {options} --out {out}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return found


def category(item: Item) -> str:
    """What the report groups an item by."""
    return str(item["fields"].get("category", ""))


def outputs(item: Item) -> int:
    """How many images or answers an item has."""
    return len(item["verdicts"])


def image_refs(run: EvalRun, item: Item) -> list[ImageRef]:
    """The images of an item: one per output, also where the official layout is one grid of them; of a question, its image."""
    if item["id"] in run.question_images:
        return [ImageRef(run.path / item["id"], opener=run.question_images[item["id"]])]
    images = [run.path / name for name in item.get("images", ())]
    if len(images) == 1 < outputs(item):
        side = math.isqrt(outputs(item))
        return [ImageRef(images[0], k, side) for k in range(outputs(item))]
    return [ImageRef(image) for image in images]


def reading(item: Item, repeat: int) -> str:
    """One output in words: the model's answer, the text that the judge read, or the judge's replies."""
    if "answer" in item:
        return str(item["answer"])
    if "read" in item["record"]:
        return str(item["record"]["read"][repeat])
    return " · ".join(map(_reply, item["replies"][repeat]))


def _reply(reply: Any) -> str:
    """Text as it is; a detector's boxes as their classes, confidences and colours; why a reply could not be read."""
    if not isinstance(reply, Mapping):
        return "" if reply is None else str(reply)
    if isinstance(reply.get("unreadable"), str):
        return f"could not be read: {reply['unreadable']}"
    found = {name: [f"{box['score']:.2f} {box.get('color', '')}".strip() for box in boxes] for name, boxes in reply.items() if boxes}
    return "; ".join(f"{name} {', '.join(boxes)}" for name, boxes in found.items()) or "nothing found"


def same_items(runs: Sequence[EvalRun]) -> None:
    """Raises SuiteError unless the runs are of one suite and the same items."""
    first = runs[0]
    for run in runs[1:]:
        if run.suite != first.suite:
            raise SuiteError(f"{first.path} is a run of {first.suite}, {run.path} one of {run.suite}; a paired comparison needs one suite")
        mine, theirs = {i["id"] for i in first.items}, {i["id"] for i in run.items}
        if mine != theirs:
            only_in = {first.path: sorted(mine - theirs), run.path: sorted(theirs - mine)}
            shown = lambda ids: ", ".join(ids[:3] + ["..."] * (len(ids) > 3))
            counts = [f"{len(ids)} only in {path} ({shown(ids)})" for path, ids in only_in.items() if ids]
            raise SuiteError(f"the runs hold different items: {', '.join(counts)}; make both with the same data and --limit")
