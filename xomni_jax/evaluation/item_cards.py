"""The card of an item on a page: its images small, the boxes a detector found, and what was read beside what was asked for."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from xomni_jax.evaluation.eval_run import EvalRun, ImageRef, Item, category, image_refs, outputs, reading
from xomni_jax.evaluation.pages import Marked, image_data

SIDE = 320  # pixels of a thumbnail: large enough to read the text of a poster
LOSSLESS = 160  # images up to this size are kept as they are
PAGE_BYTES = 24 << 20
BOX_COLOURS = 3


class Thumbnail(NamedTuple):
    """A small version of an image as a data: URL, and the size of the image itself in pixels."""

    data: str
    width: int
    height: int


def item_card(run: EvalRun, item: Item, images: Mapping[ImageRef, Thumbnail], page_folder: Path) -> dict[str, Any]:
    """One item of a run, with what was made of it, for items.html.

    "images" holds one entry per output, or the image of the question. Its "data" is "" where the page has no room for the image, and its
    "link" is the file relative to the page, "" without one. "texts" says per output what was read, with the differences to the wanted
    text marked, or what was answered.
    """
    shown = []
    for r, ref in enumerate(image_refs(run, item)):
        link, small = "" if ref.opener else quote(os.path.relpath(ref.path, page_folder)), images.get(ref)
        if link or small:
            boxes = detected_boxes(item["replies"][r], small) if small and "replies" in item else []
            shown.append({"name": ref.path.name, "link": link, "data": small.data if small else "", "boxes": boxes})
    wanted, fold_case = wanted_text(item["fields"]), item["fields"].get("language") == "en"  # as LongText-Bench counts English
    texts: list[Any] = [reading(item, r) for r in range(outputs(item))]
    if wanted and "read" in item["record"]:
        texts = [marked_differences(wanted, text, fold_case) for text in texts]
    return {
        "id": item["id"],
        "category": category(item),
        "prompt": item["prompt"],
        "score": item.get("score"),
        "images": shown,
        "wanted": wanted,
        "texts": texts,
        "verdicts": item["verdicts"],
        "answered": "answer" in item,
    }


def wanted_text(fields: Mapping[str, Any]) -> str:
    """The text that an item's images must show, or the right answers; "" for other tasks.

    LongText-Bench has its texts in "text", OneIG-Bench in "text_content" as a Python literal; questions have a label or answers.
    """
    if "text_content" in fields:
        return " ".join(ast.literal_eval(fields["text_content"]))
    wanted = next((fields[name] for name in ("text", "answers", "answer", "label") if name in fields), "")
    return wanted if isinstance(wanted, str) else (" " if "text" in fields else " | ").join(wanted)


def marked_differences(wanted: str, read: str, fold_case: bool = False) -> Marked:
    """What was read, with "ins" for characters that were not wanted and "del" for wanted ones that are missing. White space counts once."""
    wanted, read = (" ".join(text.split()) for text in (wanted, read))
    compared = [[c.lower() if fold_case else c for c in text] for text in (wanted, read)]
    parts: Marked = []
    for kind, a, b, c, d in Levenshtein.opcodes(*compared):
        parts += [("", read[c:d])] if kind == "equal" else [("del", wanted[a:b]), ("ins", read[c:d])]
    return [(mark, text) for mark, text in parts if text]


def detected_boxes(replies: Sequence[Any], image: Thumbnail) -> list[dict[str, Any]]:
    """The boxes in a detector's replies about one image: "label", "style" (place in percent of the image) and number of a colour."""
    found = []
    for detections in (reply for reply in replies if isinstance(reply, Mapping)):
        for number, (name, boxes) in enumerate(detections.items()):
            for box in boxes if isinstance(boxes, list) else ():  # not of a reply that could not be read
                left, top, right, bottom = (100 * v / side for v, side in zip(box["box"], 2 * (image.width, image.height)))
                style = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
                label = f"{name} {box['score']:.2f} {box.get('color', '')}".strip()
                found.append({"label": label, "style": style, "colour": 1 + number % BOX_COLOURS})
    return found


# ---- thumbnails ----
def image_order(runs: Sequence[EvalRun], which: Sequence[int]) -> list[ImageRef]:
    """Images of the given items, most wanted first: the first of every item and run, then the second, ..."""
    rows = [image_refs(run, run.items[i]) for i in which for run in runs]
    most = max(map(len, rows), default=0)
    return list(dict.fromkeys(row[r] for r in range(most) for row in rows if r < len(row)))


def spread(count: int) -> list[int]:
    """0 .. count-1 in an order of which any beginning lies evenly over the whole."""
    return sorted(range(count), key=lambda i: math.modf(i * (5**0.5 - 1) / 2)[0])


def embed(wanted: Sequence[ImageRef], limit: int = PAGE_BYTES) -> dict[ImageRef, Thumbnail]:
    """Thumbnails in the given order, as long as all together stay below `limit` bytes. Missing files are left out."""
    found, used = {}, 0
    for ref in tqdm(wanted, desc="thumbnails", unit="image", dynamic_ncols=True, delay=2, leave=False):
        if not ref.exists:
            continue
        small = thumbnail(ref)
        used += len(small.data)
        if used > limit:
            break
        found[ref] = small
    return found


def thumbnail(ref: ImageRef) -> Thumbnail:
    """A small version of an image."""
    image = ref.open()
    width, height = image.size
    if max(image.size) <= LOSSLESS:
        return Thumbnail(image_data(image, optimize=True), width, height)
    image.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return Thumbnail(image_data(image, "WEBP", quality=72, method=2), width, height)


def left_out(wanted: Sequence[ImageRef], found: Mapping[ImageRef, Thumbnail], limit: int = PAGE_BYTES) -> str:
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
