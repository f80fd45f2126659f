"""Records of the user's own files: an image, its caption, and further columns; each is checked, and a fault names file and line."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xomni_jax.core.config import ConfigError

IMAGE_COLUMNS = ("file_name", "image", "image_path", "img_path", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")
MORE = {"question": str, "answer": str, "targets": dict}  # what stages read beside the caption
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm")
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Record:
    """One image with its caption.

    Attributes:
      id: identifies the record: its number, and the path of the image as it was given.
      where: file and line, for messages.
      more: the other columns that a stage may read.
    """

    id: str
    image: Path
    caption: str
    where: str
    more: dict[str, Any] = field(default_factory=dict)


class FaultyRecord(ValueError):
    """A record that cannot be used: file, line and reason."""


def folder_records(folder: Path, image: str, caption: str, images: str) -> Iterator[Record | FaultyRecord]:
    """Records of a folder: those of its metadata file, or else its images, at any depth, with a .txt or .json beside each.

    Raises:
      ConfigError: there is no such folder, or it has two metadata files, or another folder below it has one.
    """
    if not folder.is_dir():
        raise ConfigError(f"config.data.path={folder}: no such folder; name a folder of images with captions")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise ConfigError(f"{folder} holds {' and '.join(TABLES)}; leave one of them")
    if tables:
        yield from table_records(tables[0], image, caption, images)
        return
    files = sorted(p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    below = [p for p in files if p.name in TABLES]
    if below:
        raise ConfigError(f"config.data.path={folder}: {below[0]} lies deeper; name the folder that holds it")
    for number, file in enumerate(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES):
        try:
            yield _record(number, _beside(file), str(file), file, str(file.relative_to(folder)), caption)
        except FaultyRecord as fault:
            yield fault


def table_records(path: Path, image: str, caption: str, images: str) -> Iterator[Record | FaultyRecord]:
    """Records of a file of JSON lines, a JSON list or a csv, whose paths are relative to `images` or to the file's folder.

    Raises:
      ConfigError: the file cannot be read, or no record has the columns of image and caption.
    """
    root = Path(images) if images else path.parent
    rows = list(read_table(path))
    names = sorted({name for row, _ in rows if isinstance(row, dict) for name in row if name})
    image, caption = (
        _column(path, key, chosen, usual, rows, names)
        for key, chosen, usual in (("image", image, IMAGE_COLUMNS), ("caption", caption, CAPTION_COLUMNS))
    )
    for number, (row, where) in enumerate(rows):
        try:
            if isinstance(row, FaultyRecord):
                raise row
            if not isinstance(row, dict):
                raise FaultyRecord(f"{where}: it is no object with named columns")
            name = get(row, image)
            if not isinstance(name, str) or not name:
                raise FaultyRecord(f"{where}: the column {image!r} names no image")
            # Links are followed: those of Hugging Face's cache lead out of the folder.
            file = Path(os.path.abspath(root / name))
            if "://" in name or os.path.isabs(name) and not images or not file.is_relative_to(os.path.abspath(root)):
                raise FaultyRecord(f"{where}: the image {name} lies outside {root}; config.data.images names the folder that may hold it")
            yield _record(number, row, where, file, name, caption)
        except FaultyRecord as fault:
            yield fault


def read_table(path: Path) -> Iterator[tuple[Any, str]]:
    """(values, "FILE line N") of a file; values are a FaultyRecord where a line is not JSON. ConfigError when it cannot be read.

    Lines end with a line feed alone: other line separators may stand inside a text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise ConfigError(f"config.data: {path} cannot be read: {reason}") from error
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
        try:
            yield from ((row, f"{path} line {rows.line_num}") for row in rows)
        except csv.Error as error:
            raise ConfigError(f"config.data: {path} line {rows.line_num + 1}: {error}; correct the quotes") from error
        return
    if text.lstrip().startswith("["):
        try:
            yield from ((row, f"{path} entry {n}") for n, row in enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config.data: {path} is no list in JSON ({error}); correct it") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield json.loads(line), where
            except (ValueError, RecursionError) as error:
                yield FaultyRecord(f"{where}: it is not JSON ({error})"), where


def get(row: Any, column: str) -> Any:
    """The value of a column, None where there is none; `a.b` looks inside a nested object."""
    if isinstance(row, dict) and column in row:
        return row[column]
    first, _, rest = column.partition(".")
    return get(row.get(first), rest) if rest and isinstance(row, dict) else None


def _column(path: Path, key: str, chosen: str, usual: Sequence[str], rows: list[tuple[Any, str]], names: list[str]) -> str:
    """The column that holds what the option `key` names, or the first of the usual ones. ConfigError when no row has it."""
    for name in [chosen] if chosen else usual:
        if any(get(row, name) is not None for row, _ in rows):
            return name
    what = f"config.data.{key}={chosen!r} is no column" if chosen else f"config.data.{key}: none of {', '.join(usual)} is a column"
    raise ConfigError(f"{what} of {path}; it has {', '.join(names) or 'none'}")


def _beside(file: Path) -> dict[str, Any]:
    """The columns of an image whose caption stands in a file of the same name."""
    for suffix in (".json", ".txt"):
        beside = file.with_suffix(suffix)
        if beside.is_file():
            rows = [(beside.read_text("utf-8-sig", "surrogateescape"), "")] if suffix == ".txt" else list(read_table(beside))
            row = {"caption": rows[0][0]} if suffix == ".txt" else rows[0][0] if rows else None
            if not isinstance(row, dict):
                raise FaultyRecord(f"{beside}: it is no object with named columns in JSON")
            return row
    raise FaultyRecord(f"{file}: there is no {file.stem}.txt or .json with its caption beside it")


def _record(number: int, row: dict[str, Any], where: str, image: Path, name: str, caption: str) -> Record:
    column = caption or next((c for c in CAPTION_COLUMNS if row.get(c) is not None), CAPTION_COLUMNS[0])
    more = {}
    for key, kind in MORE.items():
        if row.get(key) is not None:
            if not isinstance(row[key], kind):
                raise FaultyRecord(f"{where}: the column {key!r} is no {'text' if kind is str else 'object'}")
            more[key] = _clean(row[key], where, key) if kind is str else row[key]
    return Record(f"{number}:{name}", image, _clean(get(row, column), where, column), where, more)


def _clean(text: Any, where: str, column: str) -> str:
    """A text without white space around it, in Unicode's composed form. FaultyRecord when it is none, empty, or no Unicode."""
    if not isinstance(text, str) or not text.strip():
        raise FaultyRecord(f"{where}: the column {column!r} holds no text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FaultyRecord(f"{where}: the column {column!r} is not Unicode")
    return unicodedata.normalize("NFC", text.strip())
