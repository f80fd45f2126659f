"""The layouts in which official scorers expect images: one file each, grids, GenEval's folders. Written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import Item, SuiteError

Save = Callable[[Path, Item, Sequence[Image.Image]], None]
Open = Callable[[Path, Item], list[Image.Image]]


def numbered(repeats: int) -> tuple[Save, Open]:
    """{id}_{k}.png, k from 0."""

    def path(directory: Path, item: Item, k: int) -> Path:
        return Path(directory) / f"{item.id}_{k}.png"

    def save(directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        for k, image in enumerate(_counted(images, repeats, item)):
            write(path(directory, item, k), image)

    return save, lambda directory, item: [read(path(directory, item, k)) for k in range(repeats)]


def grid(repeats: int, suffix: str) -> tuple[Save, Open]:
    """{id}{suffix}: the images of one item as tiles of a square, row by row; a tile is width // columns by height // rows."""
    side = math.isqrt(repeats)
    if side * side != repeats:
        raise SuiteError(f"{repeats} images do not fill a square grid; draw 1, 4 or 9 per prompt")

    def save(directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        width, height = _counted(images, repeats, item)[0].size
        if any(p.size != (width, height) for p in images):
            raise SuiteError(f"item {item.id}: the images of one grid must have one size, got {[p.size for p in images]}")
        whole = Image.new("RGB", (side * width, side * height))
        for k, image in enumerate(images):
            whole.paste(image, (k % side * width, k // side * height))
        write(Path(directory) / f"{item.id}{suffix}", whole)

    def tiles(directory: Path, item: Item) -> list[Image.Image]:
        whole = read(Path(directory) / f"{item.id}{suffix}")
        width, height = whole.width // side, whole.height // side
        corners = [(k % side * width, k // side * height) for k in range(repeats)]
        return [whole.crop((x, y, x + width, y + height)) for x, y in corners]

    return save, tiles


def folders(repeats: int, metadata: str = "metadata") -> tuple[Save, Open]:
    """{id}/samples/{k}.png with the prompt's row, the item's field `metadata`, as {id}/metadata.jsonl (GenEval)."""

    def path(directory: Path, item: Item, k: int) -> Path:
        return Path(directory) / item.id / "samples" / f"{k:04d}.png"

    def save(directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        _counted(images, repeats, item)
        row: dict[str, Any] = item.fields[metadata]
        (Path(directory) / item.id / "samples").mkdir(parents=True, exist_ok=True)
        (Path(directory) / item.id / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        for k, image in enumerate(images):
            write(path(directory, item, k), image)

    return save, lambda directory, item: [read(path(directory, item, k)) for k in range(repeats)]


def write(path: Path, image: Image.Image) -> None:
    """Save an image under its name only once it is complete. WebP without loss: the judge sees what was drawn, and black stays black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    kind = {".png": {"format": "PNG"}, ".webp": {"format": "WEBP", "lossless": True}}[path.suffix]
    image.convert("RGB").save(part, **kind)
    os.replace(part, path)


def read(path: Path) -> Image.Image:
    """An image back, RGB. SuiteError when it is missing or broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise SuiteError(f"the image {path} is missing; draw it with --phase generate, or put it there") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SuiteError(f"the image {path} cannot be read ({type(error).__name__}); delete it and draw it again") from error


def _counted(images: Sequence[Image.Image], repeats: int, item: Item) -> Sequence[Image.Image]:
    if len(images) != repeats:
        raise SuiteError(f"item {item.id} has {len(images)} images, the suite wants {repeats}")
    return images
