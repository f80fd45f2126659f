"""The layouts in which official scorers expect pictures: one file each, grids, GenEval's folders. Written whole or not at all."""

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

    def save(directory: Path, item: Item, pictures: Sequence[Image.Image]) -> None:
        for k, picture in enumerate(_counted(pictures, repeats, item)):
            write(path(directory, item, k), picture)

    return save, lambda directory, item: [read(path(directory, item, k)) for k in range(repeats)]


def grid(repeats: int, suffix: str) -> tuple[Save, Open]:
    """{id}{suffix}: the pictures of one item as tiles of a square, row by row; a tile is width // columns by height // rows."""
    side = math.isqrt(repeats)
    if side * side != repeats:
        raise SuiteError(f"{repeats} pictures do not fill a square grid; draw 1, 4 or 9 per prompt")

    def save(directory: Path, item: Item, pictures: Sequence[Image.Image]) -> None:
        width, height = _counted(pictures, repeats, item)[0].size
        if any(p.size != (width, height) for p in pictures):
            raise SuiteError(f"item {item.id}: the pictures of one grid must have one size, got {[p.size for p in pictures]}")
        whole = Image.new("RGB", (side * width, side * height))
        for k, picture in enumerate(pictures):
            whole.paste(picture, (k % side * width, k // side * height))
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

    def save(directory: Path, item: Item, pictures: Sequence[Image.Image]) -> None:
        _counted(pictures, repeats, item)
        row: dict[str, Any] = item.fields[metadata]
        (Path(directory) / item.id / "samples").mkdir(parents=True, exist_ok=True)
        (Path(directory) / item.id / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        for k, picture in enumerate(pictures):
            write(path(directory, item, k), picture)

    return save, lambda directory, item: [read(path(directory, item, k)) for k in range(repeats)]


def write(path: Path, picture: Image.Image) -> None:
    """Save a picture under its name only once it is complete. WebP without loss: the judge sees what was drawn, and black stays black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    kind = {".png": {"format": "PNG"}, ".webp": {"format": "WEBP", "lossless": True}}[path.suffix]
    picture.convert("RGB").save(part, **kind)
    os.replace(part, path)


def read(path: Path) -> Image.Image:
    """A picture back, RGB. SuiteError when it is missing or broken."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise SuiteError(f"the picture {path} is missing; draw it with --phase generate, or put it there") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SuiteError(f"the picture {path} cannot be read ({type(error).__name__}); delete it and draw it again") from error


def _counted(pictures: Sequence[Image.Image], repeats: int, item: Item) -> Sequence[Image.Image]:
    if len(pictures) != repeats:
        raise SuiteError(f"item {item.id} has {len(pictures)} pictures, the suite wants {repeats}")
    return pictures
