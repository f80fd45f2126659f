"""report.html and results.csv of one run: the score beside the paper's and its peers', categories, and every item."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, category, outputs, read_eval_run, reading
from xomni_jax.evaluation.gallery import PAGE_BYTES, embed, gallery, image_order, left_out, spread
from xomni_jax.evaluation.markup import document, interval_text, section, table, write_text
from xomni_jax.evaluation.statistics import bootstrap_mean


def write_run_report(directory: str | Path, asked: Mapping[str, Callable[[], Image.Image]] | None = None, limit: int = PAGE_BYTES) -> Path:
    """Writes report.html and results.csv into the directory of a scored run and returns the path of the page.

    Args:
      asked: item -> opens the image that it asks about, of suites that answer.
      limit: bytes of images on the page.

    Raises:
      SuiteError: the directory holds no scored run.
    """
    run = dataclasses.replace(read_eval_run(directory), asked=asked or {})
    write_text(run.path / "results.csv", results_csv(run))
    return write_text(run.path / "report.html", page(run, limit))


def results_csv(run: EvalRun) -> str:
    """One line per output: item, repeat, what it was asked, what was read or answered, verdict, score of the item."""
    file = io.StringIO()
    rows = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # Python before 3.13 leaves a bare carriage return unquoted
    rows.writerow(("id", "repeat", "category", "prompt", "image", "text", "verdict", "item_score"))
    for item in run.items:
        images = item.get("images", ())
        for r in range(outputs(item)):
            image = images[r] if r < len(images) else ""
            score = "" if item.get("score") is None else item["score"]
            rows.writerow((item["id"], r, category(item), item["prompt"], image, reading(item, r), item["verdicts"][r], score))
    return file.getvalue()


def page(run: EvalRun, limit: int = PAGE_BYTES) -> str:
    """The whole page as HTML."""
    wanted = image_order([run], spread(len(run.items)))
    images = embed(wanted, limit)
    known = run.suite in paper.PLACES
    body = [
        f"<header><p class=over>X-Omni in JAX</p><h1>{escape(run.results['title'])}</h1></header>",
        headline(run),
        section("Settings", settings_list(run)),
        section("To be known", notes(run)) if run.results.get("notes") else "",
        section("Beside the paper", against_paper(run), "", table_note(run.suite)) if known else "",
        section("All scores", table(("", "value"), [(escape(k), [number(v)]) for k, v in run.results["scores"].items()])),
        section("By category", bars(run.results["categories"])) if run.results["categories"] else "",
        section("Every item", gallery(run, images), "", left_out(wanted, images, limit)),
    ]
    return document(escape(f"{run.results['title']}: {run.name}"), "".join(body), "gallery.css", "gallery.js")


def headline(run: EvalRun) -> str:
    """The numbers one came for."""
    results = run.results
    head, mean = results["headline"], bootstrap_mean(run.scores)
    cards = [(head["name"], number(head["value"]), run.suite)]
    if run.suite in paper.PLACES:
        place = paper.PLACES[run.suite]
        printed = paper.values(run.suite)[paper.OURS][place.column]
        cards.append(("X-Omni in the paper", printed, f"table {place.table}; here {paper.ours(results)[place.column] or 'no score'}"))
    if mean.prompts:
        between = interval_text((mean.low, mean.high), form=".3f")
        cards.append(("Mean score of an item", f"{mean.value:.3f}", f"95% over items: {between}"))
    counts = results.get("counts", {})
    of = f"of {counts['published']} published" if counts.get("published") else ""
    cards.append(("Items", str(len(run.items)), of))
    cards += [(name, number(n), "") for name, n in counts.items() if name not in ("items", "published") and (n or name == "unparsed")]
    boxes = "".join(
        f"<div class=card><p>{escape(name)}</p><strong>{escape(value)}</strong><small>{escape(note)}</small></div>"
        for name, value, note in cards
    )
    return f"<section class=headline>{boxes}</section>"


def settings_list(run: EvalRun) -> str:
    """Everything the run was made with; the judge included."""
    lines = (
        f"<div{' class=wide' * (len(str(value)) > 48)}><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in sorted(run.facts.items(), key=lambda fact: rank(fact[0]))
    )
    return f"<dl class=settings>{''.join(lines)}</dl>"


def rank(setting: str) -> int:
    """What a reader looks for first comes first, what seldom matters last."""
    first, last = ("suite", "model.", "judge.", "switches"), ("mesh.", "batch", "decode_batch", "device", "versions.")
    return next((i - 9 for i, name in enumerate(first) if setting.startswith(name)), 1 if setting.startswith(last) else 0)


def notes(run: EvalRun) -> str:
    """What the scorer says about its own numbers."""
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in run.results['notes'])}</ul>"


def against_paper(run: EvalRun) -> str:
    """The suite's columns of the paper's table, this run below."""
    place, rows = paper.PLACES[run.suite], paper.values(run.suite)
    ours = paper.ours(run.results)
    label = "This run"
    shown = {escape(model): [row[c] or "&ndash;" for c in place.columns] for model, row in rows.items()}
    shown[label] = [ours[c] or "&ndash;" for c in place.columns]
    shown = table(("", *map(escape, place.columns)), list(shown.items()), (label,))
    return f"<div class=few>{shown}</div>" if len(place.columns) == 1 else shown


def table_note(suite: str) -> str:
    """Which table, and what is to be known about it."""
    found = paper.tables()[paper.PLACES[suite].table]
    return (
        f"Table {paper.PLACES[suite].table} of the paper (arXiv 2507.22058), {found['title']}. {found['note']} "
        "The paper does not state all settings behind its numbers (xomni eval --paper-table says which)."
    )


def bars(categories: Mapping[str, Mapping[str, Any]]) -> str:
    """One bar per category, on the scale that holds them all: 1, 100 or 1000."""
    highest = max([c["score"] for c in categories.values() if c["score"] is not None], default=0.0)
    scale = next((s for s in (1, 100, 1000) if highest <= s), highest)
    rows = []
    for name, c in categories.items():
        width = 0.0 if c["score"] is None else 100 * c["score"] / scale
        rows.append(
            f"<div>{escape(name)}</div><div class=track><i style='width:{max(width, 0):.1f}%'></i></div>"
            f"<div class=number>{number(c['score'])}<small>{c['items']} items</small></div>"
        )
    return f"<div class=bars>{''.join(rows)}</div>"


def number(value: Any) -> str:
    """A score or a count for readers."""
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 10 else f"{value:.2f}" if isinstance(value, float) else str(value)
