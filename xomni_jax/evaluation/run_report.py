"""report.html and results.csv of one run: the score beside the paper's and its peers', categories, and every item."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from tqdm import tqdm

from xomni_jax.core.tables import UNKNOWN, TableCell, csv_text, format_interval
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, ImageRef, Item, category, image_refs, outputs, read_eval_run, reading
from xomni_jax.evaluation.pages import image_data, write_page
from xomni_jax.evaluation.run_directory import write_text
from xomni_jax.evaluation.statistics import bootstrap_mean

# Beginnings of the names of settings: what a reader looks for first, and what seldom matters.
FIRST, LAST = ("suite", "model.", "judge.", "switches"), ("mesh.", "batch", "decode_batch", "device", "versions.")
SIDE = 320  # pixels of a thumbnail: large enough to read the text of a poster
LOSSLESS = 160  # images up to this size are kept as they are
PAGE_BYTES = 24 << 20
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


def item_outputs(run: EvalRun, item: Item, images: dict[ImageRef, str], page_folder: Path) -> dict[str, Any]:
    """What one run made of one item, for items.html.

    "images" (one per verdict, or those that were asked about) have a data: URL in "data", "" where the page has no room for it, and in
    "link" their file relative to the page, "" without one.
    """
    shown = []
    for ref in image_refs(run, item):
        link, data = "" if ref.opener else quote(os.path.relpath(ref.path, page_folder)), images.get(ref, "")
        if link or data:
            shown.append({"name": ref.path.name, "link": link, "data": data, "lossless": data.startswith("data:image/png")})
    texts = [reading(item, r) for r in range(outputs(item))]
    return {"images": shown, "verdicts": item["verdicts"], "texts": texts, "answered": "answer" in item}


def image_order(runs: Sequence[EvalRun], which: Sequence[int]) -> list[ImageRef]:
    """Images of the given items, most wanted first: the first of every item and run, then the second, ..."""
    rows = [image_refs(run, run.items[i]) for i in which for run in runs]
    most = max(map(len, rows), default=0)
    return list(dict.fromkeys(row[r] for r in range(most) for row in rows if r < len(row)))


def spread(count: int) -> list[int]:
    """0 .. count-1 in an order of which any beginning lies evenly over the whole."""
    return sorted(range(count), key=lambda i: math.modf(i * (5**0.5 - 1) / 2)[0])


def embed(wanted: Sequence[ImageRef], limit: int = PAGE_BYTES) -> dict[ImageRef, str]:
    """data: URLs of thumbnails in the given order, as long as all together stay below `limit` bytes. Missing files are left out."""
    found, used = {}, 0
    for ref in tqdm(wanted, desc="thumbnails", unit="image", dynamic_ncols=True, delay=2, leave=False):
        if not ref.exists:
            continue
        data = thumbnail(ref)
        used += len(data)
        if used > limit:
            break
        found[ref] = data
    return found


def thumbnail(ref: ImageRef) -> str:
    """A small version of an image as a data: URL."""
    image = ref.open()
    if max(image.size) <= LOSSLESS:
        return image_data(image, optimize=True)
    image.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return image_data(image, "WEBP", quality=72, method=2)


def left_out(wanted: Sequence[ImageRef], found: dict[ImageRef, str], limit: int = PAGE_BYTES) -> str:
    """A sentence about the images that are not on the page; empty when all are."""
    missing = sum(not ref.exists for ref in wanted)
    said = []
    if more := len(wanted) - len(found) - missing:
        said.append(
            f"{len(found)} of {len(wanted)} images are on this page, which is kept below {limit / 2**20:.3g} MB: the first of each "
            f"item before any second, spread evenly over the run. The other {more} are "
            + ("left out." if wanted[0].opener else "linked: keep this page in its folder to open them.")
        )
    if missing:
        said.append(f"{missing} images are no longer in the folder of the run.")
    return " ".join(said)
