"""Tables 1 to 4 of the paper (arXiv 2507.22058), and where each suite stands in them. Values are kept as printed, digits and all."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

OURS = "X-Omni"


@dataclass(frozen=True)
class Place:
    """Where a suite's numbers stand in the paper.

    Attributes:
      table: 1 to 4. column: of the headline number.
      unit: the paper's number of a perfect result over ours, such as 100 where the paper prints percent and the scorer a share.
      parts: further columns of the table -> the category of our results that belongs there.
    """

    table: int
    column: str
    unit: float = 1.0
    parts: Mapping[str, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of this suite, the headline last as in the paper."""
        return (*(self.parts or ()), self.column)

    def ours(self, results: Mapping[str, Any]) -> dict[str, float | None]:
        """Column -> value of a run in the paper's unit; None where the run has none."""
        found = {column: results["categories"].get(name, {}).get("score") for column, name in (self.parts or {}).items()}
        found[self.column] = results["headline"]["value"]
        return {column: None if value is None else self.unit * value for column, value in found.items()}


PLACES = {
    "oneig-text-en": Place(1, "OneIG EN"),
    "oneig-text-zh": Place(1, "OneIG ZH"),
    "longtext-en": Place(1, "LongText EN"),
    "longtext-zh": Place(1, "LongText ZH"),
    "dpg": Place(2, "Overall", 1.0, {name.capitalize(): name for name in ("global", "entity", "attribute", "relation", "other")}),
    "geneval": Place(
        3,
        "Overall",
        1.0,
        {
            "Single": "single_object",
            "Two": "two_object",
            "Counting": "counting",
            "Colours": "colors",
            "Position": "position",
            "Colour attr.": "color_attr",
        },
    ),
    "pope": Place(4, "POPE", 100.0),
    "gqa": Place(4, "GQA", 100.0),
    "mmbench": Place(4, "MMBench", 100.0),
    "seedbench": Place(4, "SEED-Img", 100.0),
    "docvqa": Place(4, "DocVQA", 100.0),
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


def as_printed(value: float, suite: str) -> str:
    """A value with as many decimals as the paper's of the same suite."""
    printed = values(suite)[OURS][PLACES[suite].column]
    return f"{value:.{len(printed.partition('.')[2])}f}"
