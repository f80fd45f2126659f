"""Layouts in which official scorers expect the images of an item, other than one file each. A suite inherits one before `Suite`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from xomni_jax.evaluation.suite import Item, Suite, SuiteError, read_image, write_image


class GridLayout(Suite):
    """{id}{suffix}: the images of one item as tiles of a square, row by row; a tile is width // columns by height // rows."""

    suffix = ".png"

    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        side, (width, height) = math.isqrt(self.repeats), self.counted(images, item)[0].size
        if any(p.size != (width, height) for p in images):
            raise SuiteError(f"item {item.id}: the images of one grid must have one size, got {[p.size for p in images]}")
        grid = Image.new("RGB", (side * width, side * height))
        for k, image in enumerate(images):
            grid.paste(image, (k % side * width, k // side * height))
        write_image(Path(directory) / f"{item.id}{self.suffix}", grid)

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        side, grid = math.isqrt(self.repeats), read_image(Path(directory) / f"{item.id}{self.suffix}")
        width, height = grid.width // side, grid.height // side
        corners = [(k % side * width, k // side * height) for k in range(self.repeats)]
        return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


class FolderLayout(Suite):
    """{id}/samples/{k}.png, and the prompt's row, which is the item's field "metadata", as {id}/metadata.jsonl (GenEval)."""

    def save(self, directory: Path, item: Item, images: Sequence[Image.Image]) -> None:
        folder = Path(directory) / item.id
        for k, image in enumerate(self.counted(images, item)):
            write_image(folder / "samples" / f"{k:04d}.png", image)
        (folder / "metadata.jsonl").write_text(json.dumps(item.fields["metadata"]) + "\n", encoding="utf-8")

    def open(self, directory: Path, item: Item) -> list[Image.Image]:
        return [read_image(Path(directory) / item.id / "samples" / f"{k:04d}.png") for k in range(self.repeats)]
