"""Folders of images as tables: with a metadata file, with a text beside each image, or pairs with the seeds they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xomni_jax.core.config import ConfigError
from xomni_jax.data.records import IMAGE_SUFFIXES
from xomni_jax.data.tables import FaultyRecord, Table
from xomni_jax.data.text_tables import ListTable, columns, open_text

METADATA = ("metadata.jsonl", "metadata.csv")


def open_folder(files: Sequence[Path], root: Path) -> Table:
    """The table of a folder's metadata file, or else of its images at any depth, each with a .txt or .json beside it.

    Raises:
      ConfigError: it has two metadata files, or another folder below it has one.
    """
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    tables = [file for file in files if file.name in METADATA]
    if any(table.parent != root for table in tables):
        raise ConfigError(f"config.data.path={root}: {tables[0]} lies deeper; name the folder that holds it")
    if len(tables) > 1:
        raise ConfigError(f"{root} holds {' and '.join(METADATA)}; leave one of them")
    if not tables:
        return _Beside(images, root)
    table = open_text(tables, root)
    table.notes += [f"{image}: an image without metadata" for image in _unlisted(table, images, root)]
    return table


def open_seeds(files: Sequence[Path], root: Path) -> Table:
    """The pairs of instruct-pix2pix: seeds.json lists [name, [seed, ...]]; each seed is a row.

    Raises:
      ConfigError: seeds.json cannot be read.
    """
    (path,) = files
    try:
        rows = [(name, seed) for name, seeds in _json(path) for seed in (seeds or [None])]
    except (FaultyRecord, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no list of names, each with its seeds ({error}); correct it") from error

    def parse(row: tuple[str, int | None]) -> dict[str, Any]:
        name, seed = row
        if seed is None:
            raise FaultyRecord("there are no seeds")
        text = columns(_json(root / name / "prompt.json")).get("edit")
        return {"id": f"{name}/{seed}", "text": text, "input": f"{name}/{seed}_0.jpg", "output": f"{name}/{seed}_1.jpg"}

    return ListTable(path, root, rows, lambda n: str(root / "/".join(str(part) for part in rows[n] if part is not None)), parse)


class _Beside:
    """Images whose text stands in a file of the same name."""

    def __init__(self, images: Sequence[Path], root: Path):
        self.images, self.root = images, root
        self.digest = hashlib.sha256("\0".join(map(str, images)).encode("utf-8", "surrogateescape")).hexdigest()
        self.notes = [] if images else [f"{root}: holds no images"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = self.images[number]
        found = {"file_name": str(image.relative_to(self.root))}
        try:
            if image.with_suffix(".json").is_file():
                return found | columns(_json(image.with_suffix(".json")))
            return found | {"text": image.with_suffix(".txt").read_bytes().decode("utf-8-sig", "surrogateescape")}
        except FileNotFoundError:
            raise FaultyRecord(f"{image}: there is no {image.stem}.txt or .json with its caption beside it") from None
        except FaultyRecord as fault:
            raise FaultyRecord(f"{image}: {fault}") from None

    def where(self, number: int) -> str:
        """The image."""
        return str(self.images[number])


def _unlisted(table: Table, images: Sequence[Path], root: Path) -> list[Path]:
    """The images that no row names."""
    named: set[Path] = set()
    for n in range(len(table)):
        with suppress(FaultyRecord):
            for value in table[n].values():
                named |= {root / name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)}
    return [image for image in images if image not in named]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FaultyRecord(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
