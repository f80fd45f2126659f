"""Tables 1 to 4 of the paper (arXiv 2507.22058), and where each suite stands in them. Values are kept as printed, digits and all."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from xomni_jax.evaluation.suites import get_suite

OURS = "X-Omni"


@dataclass(frozen=True)
class Place:
    """Where a suite's numbers stand in the paper.

    Attributes:
      table: 1 to 4. column: of the headline number.
      parts: further columns of the table -> the category of our results that belongs there.
    """

    table: int
    column: str
    parts: Mapping[str, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of this suite, the headline last as in the paper."""
        return (*(self.parts or ()), self.column)


PLACES = {
    "oneig-text-en": Place(1, "OneIG EN"),
    "oneig-text-zh": Place(1, "OneIG ZH"),
    "longtext-en": Place(1, "LongText EN"),
    "longtext-zh": Place(1, "LongText ZH"),
    "dpg": Place(2, "Overall", {name.capitalize(): name for name in ("global", "entity", "attribute", "relation", "other")}),
    "geneval": Place(
        3,
        "Overall",
        {
            "Single": "single_object",
            "Two": "two_object",
            "Counting": "counting",
            "Colours": "colors",
            "Position": "position",
            "Colour attr.": "color_attr",
        },
    ),
    "pope": Place(4, "POPE"),
    "gqa": Place(4, "GQA"),
    "mmbench": Place(4, "MMBench"),
    "seedbench": Place(4, "SEED-Img"),
    "docvqa": Place(4, "DocVQA"),
    "ocrbench": Place(4, "OCRBench"),
}


@functools.cache
def tables() -> dict[int, dict[str, Any]]:
    """Number of the table -> {"title", "note", "columns", "rows": {model: values as printed, None where there is none}}."""
    text = (resources.files("xomni_jax") / "assets" / "paper_tables.json").read_text(encoding="utf-8")
    return {int(number): table for number, table in json.loads(text).items()}


def values(suite: str) -> dict[str, dict[str, str | None]]:
    """Model -> {column: value as printed} over the columns of a suite; models without any are left out. X-Omni is the last."""
    place = PLACES[suite]
    table = tables()[place.table]
    at = {column: table["columns"].index(column) for column in place.columns}
    rows = {model: {column: row[i] for column, i in at.items()} for model, row in table["rows"].items()}
    return {model: row for model, row in rows.items() if any(row.values())}


def ours(results: Mapping[str, Any]) -> dict[str, str | None]:
    """Column -> value of a run as the paper would print it; None where the run has none."""
    suite = results["suite"]
    place = PLACES[suite]
    found = {column: results["categories"].get(name, {}).get("score") for column, name in (place.parts or {}).items()}
    found[place.column] = results["headline"]["value"]
    scale = get_suite(suite).paper_scale
    return {column: None if value is None else as_printed(scale * value, suite) for column, value in found.items()}


def as_printed(value: float, suite: str) -> str:
    """A value with as many decimals as the paper's of the same suite."""
    printed = values(suite)[OURS][PLACES[suite].column]
    return f"{value:.{len(printed.partition('.')[2])}f}"
