"""Every item of a run on a page: prompt, images, what was read or answered, verdict; to be filtered and sorted in the browser."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from xomni_jax.evaluation.eval_run import EvalRun, Item, Shot, category, outputs, reading, shots
from xomni_jax.evaluation.markup import image_data

SIDE = 320  # pixels of a thumbnail: large enough to read the text of a poster
LOSSLESS = 160  # images up to this size are kept as they are
LONG = 220  # characters of a text that are shown before the rest is folded
PIXEL = {False: "", True: " class=pixel"}
PAGE_BYTES = 24 << 20


def thumbnail(shot: Shot) -> str:
    """A small version of an image as a data: address."""
    image = shot.open()
    if max(image.size) <= LOSSLESS:
        return image_data(image, "PNG", optimize=True)
    image.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return image_data(image, "WEBP", quality=72, method=2)


def spread(count: int) -> list[int]:
    """0 .. count-1 in an order of which any beginning lies evenly over the whole."""
    return sorted(range(count), key=lambda i: math.modf(i * (5**0.5 - 1) / 2)[0])


def image_order(runs: Sequence[EvalRun], which: Sequence[int]) -> list[Shot]:
    """Images of the given items, most wanted first: the first of every item and run, then the second, ..."""
    rows = [shots(run, run.items[i]) for i in which for run in runs]
    most = max(map(len, rows), default=0)
    return list(dict.fromkeys(row[r] for r in range(most) for row in rows if r < len(row)))


def embed(wanted: Sequence[Shot], limit: int = PAGE_BYTES) -> dict[Shot, str]:
    """Thumbnails in the given order as long as all together stay below `limit` bytes. Files that are gone are left out."""
    found, used = {}, 0
    for shot in tqdm(wanted, desc="thumbnails", unit="image", dynamic_ncols=True, delay=2, leave=False):
        if not shot.exists:
            continue
        data = thumbnail(shot)
        used += len(data)
        if used > limit:
            break
        found[shot] = data
    return found


def left_out(wanted: Sequence[Shot], found: dict[Shot, str], limit: int = PAGE_BYTES) -> str:
    """A sentence about the images that are not on the page; empty when all are."""
    gone = sum(not shot.exists for shot in wanted)
    said = []
    if more := len(wanted) - len(found) - gone:
        said.append(
            f"{len(found)} of {len(wanted)} images are on this page, which is kept below {limit / 2**20:.3g} MB: the first of each "
            f"item before any second, spread evenly over the run. The other {more} are "
            + ("left out." if wanted[0].opener else "linked: keep this page in its folder to open them.")
        )
    if gone:
        said.append(f"{gone} images are no longer in the folder of the run.")
    return " ".join(said)


def gallery(run: EvalRun, images: dict[Shot, str]) -> str:
    """Controls and all items."""
    shown = "".join(card(run, item, images) for item in run.items)
    return controls(run.categories) + f'<div id="items" class="items {"answers" if "answer" in run.items[0] else ""}">{shown}</div>'


ORDERS = ("as published", "lowest score first", "highest score first")


def controls(categories: Iterable[str], orders: Sequence[str] = ORDERS) -> str:
    """Category, order (as listed, rising, falling) and search; hidden where scripts do not run."""
    names = sorted(set(categories) - {""})
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    select = f'<label>Category <select name="category"><option value="">all</option>{options}</select></label>' if names else ""
    order = "".join(f'<option value="{value}">{name}</option>' for value, name in zip(("", "low", "high"), orders, strict=True))
    return (
        f'<form id="controls" hidden>{select}<label>Order <select name="sort">{order}</select></label>'
        '<label>Search <input name="find" type="search" placeholder="prompt, text, verdict"></label>'
        '<output aria-live="polite"></output></form>'
    )


def card(run: EvalRun, item: Item, images: dict[Shot, str]) -> str:
    """One item: head, prompt, and its images or its answer with what is said about them."""
    if "answer" in item:
        shown = "".join(image(shot, run.path, images) for shot in shots(run, item))
        body = f'{shown}<p class="answer">{folded(reading(item, 0)) or "&empty;"}</p>{verdict(item, 0)}'
    else:
        body = f"<div class=images>{output_figures(run, item, images)}</div>"
    return article(item, f'<div class="prompt">{folded(item["prompt"])}</div>{body}')


def article(item: Item, body: str, by: float | None = None, badge: str = "") -> str:
    """The frame of an item, with what the script filters and sorts by: `by` and its `badge`, or else the item's score."""
    if not badge:
        by = item.get("score")
        badge = "not scored" if by is None else f"{by:.2f}"
    return (
        f'<article data-category="{escape(category(item))}" data-score="{"" if by is None else f"{by:.6g}"}">'
        f'<h3><b class="score" style="--v:{by or 0:.3f}">{badge}</b> <span>{escape(item["id"])}</span> '
        f"<small>{escape(category(item))}</small></h3>{body}</article>"
    )


def output_figures(run: EvalRun, item: Item, images: dict[Shot, str], root: Path | None = None) -> str:
    """The images of an item, each over its verdict and what was read in it. Links start from `root`, the folder of the page."""
    drawn = [image(shot, root or run.path, images) for shot in shots(run, item)]
    drawn = drawn or [""] * outputs(item)  # judged images of another program are not listed
    return "".join(
        f"<figure>{shown}<figcaption>{verdict(item, r)}{folded(reading(item, r)) or '&empty;'}</figcaption></figure>"
        for r, shown in enumerate(drawn)
    )


def image(shot: Shot, root: Path, images: dict[Shot, str]) -> str:
    """A thumbnail that opens the file beside the page; a link where the thumbnail was left out."""
    if shot.opener is not None:
        return f'<img{PIXEL[is_small(images[shot])]} loading="lazy" alt="" src="{images[shot]}">' if shot in images else ""
    link, name = quote(os.path.relpath(shot.path, root)), escape(shot.path.name)
    if shot not in images:
        return f'<a class="file" href="{link}">{name}</a>'
    return f'<a href="{link}"><img{PIXEL[is_small(images[shot])]} loading="lazy" alt="{name}" src="{images[shot]}"></a>'


def is_small(data: str) -> bool:
    """Whether a thumbnail is an image of few pixels, kept as it is."""
    return data.startswith("data:image/png")


def verdict(item: Item, repeat: int) -> str:
    """The verdict on one output."""
    return f'<strong class="verdict">{escape(str(item["verdicts"][repeat]))}</strong> '


def folded(text: str) -> str:
    """A text whose later part has to be unfolded when it is long."""
    if len(text) <= LONG * 1.3:
        return escape(text)
    cut = text.rfind(" ", LONG // 2, LONG)
    cut = LONG if cut < 0 else cut
    return f"<details><summary>{escape(text[:cut])} …</summary>{escape(text[cut:])}</details>"
