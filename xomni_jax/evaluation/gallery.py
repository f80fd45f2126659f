"""The items of a run as a page shows them: small images that fit into one file, and what was read or answered with its verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from xomni_jax.evaluation.eval_run import EvalRun, ImageRef, Item, image_refs, outputs, reading
from xomni_jax.evaluation.pages import image_data

SIDE = 320  # pixels of a thumbnail: large enough to read the text of a poster
LOSSLESS = 160  # images up to this size are kept as they are
PAGE_BYTES = 24 << 20
ORDERS = ("as published", "lowest score first", "highest score first")


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
