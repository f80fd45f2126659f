"""A finished run of a suite, as its directory tells it: settings.json, items.jsonl, results.json, and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.evaluation.suite import SuiteError

Item = dict[str, Any]  # a line of items.jsonl


class Shot(NamedTuple):
    """A picture: a file, or tile `k` of a file that holds side x side of them, row by row."""

    path: Path
    k: int = 0
    side: int = 1

    def open(self) -> Image.Image:
        """The picture, RGB."""
        with Image.open(self.path) as whole:
            if self.side == 1:
                return whole.convert("RGB")
            width, height = whole.width // self.side, whole.height // self.side
            x, y = self.k % self.side * width, self.k // self.side * height
            return whole.crop((x, y, x + width, y + height)).convert("RGB")


@dataclass(frozen=True)
class EvalRun:
    """What a run measured; `items` are sorted by id."""

    path: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    items: list[Item]

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return self.results["suite"]

    @property
    def name(self) -> str:
        """What a reader calls the run: its folder."""
        return self.path.name or str(self.path)

    @property
    def scores(self) -> np.ndarray:
        """Score per item, 0 to 1, NaN where there is none."""
        return np.array([np.nan if item.get("score") is None else item["score"] for item in self.items], np.float64)

    @property
    def categories(self) -> list[str]:
        """Category per item; "" where the suite has none."""
        return [category(item) for item in self.items]


def read_eval_run(directory: str | Path) -> EvalRun:
    """The run in a directory.

    Raises:
      SuiteError: no run here, not scored yet, or a damaged file; the sentence says how to go on.
    """
    path = Path(directory)
    if not (path / "results.json").is_file():
        again = f"score it first: {command(_read(path / 'settings.json'), path)} --phase score" if _has_settings(path) else MAKE_ONE
        raise SuiteError(f"{path}: no results.json here; {again}")
    items = []
    with (path / "items.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                items.append(json.loads(line))
            except ValueError:
                raise SuiteError(f"{path / 'items.jsonl'}:{number}: not JSON; score the run again") from None
    if not items:
        raise SuiteError(f"{path / 'items.jsonl'}: no items; score the run again")
    return EvalRun(path, _read(path / "settings.json"), _read(path / "results.json"), sorted(items, key=lambda item: item["id"]))


MAKE_ONE = "make a run first: xomni eval SUITE --model MODEL --data DATA --out RUN (xomni eval --help)"


def command(settings: dict[str, Any], out: str | Path, **changes: Any) -> str:
    """The command line that makes a run of these settings, some of them changed."""
    known = {"model": "MODEL", "data": "DATA"} | settings | changes
    options = [f"--{name.replace('_', '-')} {known[name]}" for name in ("model", "data", *changes) if name not in ()]
    return f"xomni eval {known.get('suite', 'SUITE')} {' '.join(dict.fromkeys(options))} --out {out}"


def category(item: Item) -> str:
    """What the report groups an item by."""
    return str(item["fields"].get("category", ""))


def outputs(item: Item) -> int:
    """How many pictures or answers an item has."""
    return len(item["verdicts"])


def shots(run: EvalRun, item: Item) -> list[Shot]:
    """The kept pictures of an item: one per output, also where the official layout is one grid of them; of a question, its picture."""
    images = [run.path / name for name in item.get("images", ())]
    if len(images) == 1 < outputs(item):
        side = math.isqrt(outputs(item))
        return [Shot(images[0], k, side) for k in range(outputs(item))]
    return [Shot(image) for image in images]


def reading(item: Item, repeat: int) -> str:
    """What a reader is told about one output: the model's answer, what the judge read, or else the judge's replies."""
    if "answer" in item:
        return str(item["answer"])
    if "read" in item["record"]:
        return str(item["record"]["read"][repeat])
    return " · ".join(map(_reply, item["replies"][repeat]))


def _reply(reply: Any) -> str:
    return reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False)


def same_items(runs: Sequence[EvalRun]) -> None:
    """Raises SuiteError unless the runs are of one suite and the same items."""
    first = runs[0]
    for run in runs[1:]:
        if run.suite != first.suite:
            raise SuiteError(
                f"{first.path} is a run of {first.suite}, {run.path} one of {run.suite}; a paired comparison needs one suite"
            )
        mine, theirs = {i["id"] for i in first.items}, {i["id"] for i in run.items}
        if mine != theirs:
            told = [f"{len(ids)} only in {path} ({examples(ids)})" for path, ids in ((first.path, mine - theirs), (run.path, theirs - mine)) if ids]
            raise SuiteError(f"the runs hold different items: {', '.join(told)}; make both with the same data and --limit")


def examples(ids: set[str]) -> str:
    """The first few of many ids."""
    return ", ".join(sorted(ids)[:3]) + (", ..." if len(ids) > 3 else "")


def _has_settings(path: Path) -> bool:
    return (path / "settings.json").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"{path}: missing; {MAKE_ONE}") from None
    except ValueError:
        raise SuiteError(f"{path}: not JSON; score the run again") from None
