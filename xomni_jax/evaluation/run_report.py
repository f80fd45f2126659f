"""report.html and results.csv of one run: the score and whether it compares with the paper's, categories, settings, and every item."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.core.folders import write_text
from xomni_jax.core.tables import UNKNOWN, TableCell, csv_text, format_interval
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, category, outputs, read_eval_run, reading
from xomni_jax.evaluation.item_cards import PAGE_BYTES, embed, image_order, item_card, left_out, spread
from xomni_jax.evaluation.pages import write_page

# Beginnings of the names of settings: what a reader looks for first, and what seldom matters.
FIRST, LAST = ("suite", "model.", "judge.", "switches"), ("mesh.", "batch", "decode_batch", "device", "versions.")
ORDERS = ("as published", "lowest score first", "highest score first")


def write_run_report(
    directory: str | Path, question_images: Mapping[str, Callable[[], Image.Image]] | None = None, limit: int = PAGE_BYTES
) -> Path:
    """Writes report.html and results.csv into the directory of a scored run and returns the path of the page.

    Args:
      question_images: item id -> opens the image that the question is about, of suites that answer.
      limit: bytes of images on the page.

    Raises:
      SuiteError: the directory holds no scored run.
    """
    run = dataclasses.replace(read_eval_run(directory), question_images=question_images or {})
    # Python before 3.13 leaves a bare carriage return unquoted unless every text is quoted.
    write_text(run.path / "results.csv", csv_text(output_rows(run), csv.QUOTE_NONNUMERIC))
    published = run.published_order
    wanted = image_order([run], [published[i] for i in spread(len(published))])
    images = embed(wanted, limit)
    return write_page(
        run.path / "report.html",
        "run.html",
        run=run,
        cards=headline(run),
        objections=paper.objections(run.results),
        paper=paper_tables(run) if run.suite in paper.COLUMNS else None,
        scores=score_rows(run),
        categories=bars(run),
        settings=[(name, str(value)) for name, value in sorted(run.flat_settings.items(), key=lambda setting: rank(setting[0]))],
        items=[item_card(run, run.items[i], images, run.path) for i in published],
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
    head, counts = run.results["headline"], run.results["counts"]
    interval = f"95% interval {format_interval(head['interval'], '.4g')}" if head.get("interval") else "no interval"
    cards = [(head["name"], score_text(head["value"]), f"{interval}; {paper.sample(run.results)}")]
    if run.suite in paper.COLUMNS:
        column = paper.COLUMNS[run.suite].headline
        mine = f"this run: {paper.ours(run.results)[column] or UNKNOWN}, {'not ' * bool(paper.objections(run.results))}comparable"
        cards.append(("X-Omni in the paper", paper.values(run.suite)[paper.OURS][column], mine))
    told = {name: n for name, n in counts.items() if name not in ("items", "published") and (n or name == "unparsed")}
    return cards + [({"unparsed": "unreadable replies"}.get(name, name), score_text(n), "") for name, n in told.items()]


def paper_tables(run: EvalRun) -> dict[str, Any]:
    """The suite's columns of the paper's table; "ours" is this run's row among them, or in a table of its own when it is not comparable."""
    columns = paper.COLUMNS[run.suite]
    table = paper.tables()[columns.table]
    row = lambda name, values: [name, *(values[c] or UNKNOWN for c in columns.all)]
    published = [["", *columns.all], *(row(model, values) for model, values in paper.values(run.suite).items())]
    mine: list[list[TableCell]] = [row("This run", paper.ours(run.results))]
    apart = bool(paper.objections(run.results))
    return {
        "note": f"Table {columns.table} of the paper (arXiv 2507.22058), {table['title']}. {table['note']} "
        "The paper does not state all settings behind its numbers (xomni eval --paper-table says which).",
        "ours": [["", *columns.all, "items"], [*mine[0], paper.sample(run.results)]] if apart else None,
        "published": published if apart else published + mine,
    }


def score_rows(run: EvalRun) -> list[tuple[str, str]]:
    """All scores, the headline first."""
    scores, head = run.results["scores"], run.results["headline"]["name"]
    return [("", "value"), *((name, score_text(scores[name])) for name in sorted(scores, key=lambda name: name != head))]


def rank(setting: str) -> int:
    """Where a setting stands on the page."""
    return next((i - len(FIRST) for i, name in enumerate(FIRST) if setting.startswith(name)), 1 if setting.startswith(LAST) else 0)


def bars(run: EvalRun) -> list[tuple[str, float, str, int]]:
    """Name, width in percent, score and items of each category, on the scale that holds them all: 1, 100 or 1000."""
    categories = {name: run.results["categories"][name] for name in paper.category_order(run)}
    highest = max([c["score"] for c in categories.values() if c["score"] is not None], default=0.0)
    scale = next((s for s in (1, 100, 1000) if highest <= s), highest)
    width = lambda score: 0.0 if score is None else max(100 * score / scale, 0.0)
    return [(name, width(c["score"]), score_text(c["score"]), c["items"]) for name, c in categories.items()]


def score_text(value: float | int | None) -> str:
    """A score or a count for readers."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return UNKNOWN if value is None else str(value)
