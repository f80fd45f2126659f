"""Tables 1 to 4 of the paper (arXiv 2507.22058), and where each suite stands in them. Values are kept as printed, digits and all."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from xomni_jax.evaluation.suites import get_suite

OURS = "X-Omni"


@dataclass(frozen=True)
class SuiteColumns:
    """The columns of a table of the paper that hold a suite's numbers.

    Attributes:
      table: 1 to 4.
      headline: the column of the suite's headline number.
      categories: further columns of the table -> the category of our results that belongs there.
    """

    table: int
    headline: str
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns, the headline last as in the paper."""
        return (*self.categories, self.headline)


COLUMNS = {
    "oneig-text-en": SuiteColumns(1, "OneIG EN"),
    "oneig-text-zh": SuiteColumns(1, "OneIG ZH"),
    "longtext-en": SuiteColumns(1, "LongText EN"),
    "longtext-zh": SuiteColumns(1, "LongText ZH"),
    "dpg": SuiteColumns(2, "Overall", {name.capitalize(): name for name in ("global", "entity", "attribute", "relation", "other")}),
    "geneval": SuiteColumns(
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
    "pope": SuiteColumns(4, "POPE"),
    "gqa": SuiteColumns(4, "GQA"),
    "mmbench": SuiteColumns(4, "MMBench"),
    "seedbench": SuiteColumns(4, "SEED-Img"),
    "docvqa": SuiteColumns(4, "DocVQA"),
    "ocrbench": SuiteColumns(4, "OCRBench"),
}


@functools.cache
def tables() -> dict[int, dict[str, Any]]:
    """Number of the table -> {"title", "note", "columns", "rows": {model: values as printed, None where there is none}}."""
    text = (resources.files("xomni_jax") / "assets" / "paper_tables.json").read_text(encoding="utf-8")
    return {int(number): table for number, table in json.loads(text).items()}


def values(suite: str) -> dict[str, dict[str, str | None]]:
    """Model -> {column: value as printed} over the columns of a suite; models without any are left out. X-Omni is the last."""
    columns = COLUMNS[suite]
    table = tables()[columns.table]
    at = {column: table["columns"].index(column) for column in columns.all}
    rows = {model: {column: row[i] for column, i in at.items()} for model, row in table["rows"].items()}
    return {model: row for model, row in rows.items() if any(row.values())}


def ours(results: Mapping[str, Any]) -> dict[str, str | None]:
    """Column -> value of a run in the paper's scale and digits; None where the run has none."""
    suite = results["suite"]
    columns, scale = COLUMNS[suite], get_suite(suite).paper_scale
    scores = {column: results["categories"].get(name, {}).get("score") for column, name in columns.categories.items()}
    scores[columns.headline] = results["headline"]["value"]
    decimals = len(values(suite)[OURS][columns.headline].partition(".")[2])
    return {column: None if value is None else f"{scale * value:.{decimals}f}" for column, value in scores.items()}
