"""report.html and results.csv of one run: the score beside the paper's and its peers', categories, and every item."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.core.tables import UNKNOWN, TableCell, csv_text, format_interval
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, category, outputs, read_eval_run, reading
from xomni_jax.evaluation.gallery import ORDERS, PAGE_BYTES, embed, image_order, item_outputs, left_out, spread
from xomni_jax.evaluation.pages import write_page, write_text
from xomni_jax.evaluation.statistics import bootstrap_mean

# Beginnings of the names of settings: what a reader looks for first, and what seldom matters.
FIRST, LAST = ("suite", "model.", "judge.", "switches"), ("mesh.", "batch", "decode_batch", "device", "versions.")


def write_run_report(directory: str | Path, asked: Mapping[str, Callable[[], Image.Image]] | None = None, limit: int = PAGE_BYTES) -> Path:
    """Writes report.html and results.csv into the directory of a scored run and returns the path of the page.

    Args:
      asked: item -> opens the image that it asks about, of suites that answer.
      limit: bytes of images on the page.

    Raises:
      SuiteError: the directory holds no scored run.
    """
    run = dataclasses.replace(read_eval_run(directory), asked=asked or {})
    # Python before 3.13 leaves a bare carriage return unquoted unless every text is quoted.
    write_text(run.path / "results.csv", csv_text(output_rows(run), csv.QUOTE_NONNUMERIC))
    wanted = image_order([run], spread(len(run.items)))
    images = embed(wanted, limit)
    in_paper = run.suite in paper.COLUMNS
    return write_page(
        run.path / "report.html",
        "run.html",
        run=run,
        cards=headline(run),
        settings=[(name, str(value)) for name, value in sorted(run.flat_settings.items(), key=lambda setting: rank(setting[0]))],
        notes=run.results.get("notes"),
        paper=paper_table(run) if in_paper else None,
        paper_note=paper_note(run.suite) if in_paper else "",
        scores=[("", "value"), *((name, score_text(value)) for name, value in run.results["scores"].items())],
        categories=bars(run.results["categories"]),
        items=[
            {"id": item["id"], "category": category(item), "score": item.get("score"), "prompt": item["prompt"]}
            | {"made": item_outputs(run, item, images, run.path)}
            for item in run.items
        ],
        orders=ORDERS,
        left_out=left_out(wanted, images, limit),
    )


def output_rows(run: EvalRun) -> Iterator[tuple[Any, ...]]:
    """Rows of the CSV, one per output: item, repeat, what it was asked, what was read or answered, verdict, score of the item."""
    yield "id", "repeat", "category", "prompt", "image", "text", "verdict", "item_score"
    for item in run.items:
        images = item.get("images", ())
        for r in range(outputs(item)):
            image = images[r] if r < len(images) else ""
            yield item["id"], r, category(item), item["prompt"], image, reading(item, r), item["verdicts"][r], item.get("score")


def headline(run: EvalRun) -> list[tuple[str, str, str]]:
    """The main numbers: name, value, note."""
    head, mean, counts = run.results["headline"], bootstrap_mean(run.scores), run.results.get("counts", {})
    cards = [(head["name"], score_text(head["value"]), run.suite)]
    if run.suite in paper.COLUMNS:
        columns = paper.COLUMNS[run.suite]
        printed = paper.values(run.suite)[paper.OURS][columns.headline]
        ours = paper.ours(run.results)[columns.headline] or "no score"
        cards.append(("X-Omni in the paper", printed, f"table {columns.table}; here {ours}"))
    if mean.prompts:
        cards.append(("Mean score of an item", f"{mean.value:.3f}", f"95% over items: {format_interval((mean.low, mean.high), '.3f')}"))
    cards.append(("Items", str(len(run.items)), f"of {counts['published']} published" if counts.get("published") else ""))
    return cards + [
        (name, score_text(n), "") for name, n in counts.items() if name not in ("items", "published") and (n or name == "unparsed")
    ]


def rank(setting: str) -> int:
    """Where a setting stands on the page."""
    return next((i - len(FIRST) for i, name in enumerate(FIRST) if setting.startswith(name)), 1 if setting.startswith(LAST) else 0)


def paper_table(run: EvalRun) -> list[list[TableCell]]:
    """The suite's columns of the paper's table, this run below."""
    columns = paper.COLUMNS[run.suite].all
    rows = paper.values(run.suite) | {"This run": paper.ours(run.results)}
    return [["", *columns], *([model, *(row[c] or UNKNOWN for c in columns)] for model, row in rows.items())]


def paper_note(suite: str) -> str:
    """Which table of the paper it is, and how far it can be compared."""
    number = paper.COLUMNS[suite].table
    table = paper.tables()[number]
    return (
        f"Table {number} of the paper (arXiv 2507.22058), {table['title']}. {table['note']} "
        "The paper does not state all settings behind its numbers (xomni eval --paper-table says which)."
    )


def bars(categories: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, str, int]]:
    """Name, width in percent, score and items of each category, on the scale that holds them all: 1, 100 or 1000."""
    highest = max([c["score"] for c in categories.values() if c["score"] is not None], default=0.0)
    scale = next((s for s in (1, 100, 1000) if highest <= s), highest)
    width = lambda score: 0.0 if score is None else max(100 * score / scale, 0.0)
    return [(name, width(c["score"]), score_text(c["score"]), c["items"]) for name, c in categories.items()]


def score_text(value: float | int | None) -> str:
    """A score or a count for readers."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return UNKNOWN if value is None else str(value)
