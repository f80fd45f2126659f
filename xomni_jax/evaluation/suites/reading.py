"""Rows of the published files (jsonl, json, csv, tsv, parquet), each with its file and line, and their images, read when asked for.

Question tables come as VLMEvalKit publishes them (tsv, images in base64) and as lmms-lab does on Hugging Face (parquet, images as bytes).
"""

from __future__ import annotations

import ast
import base64
import csv
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image
from xomni_jax.evaluation.suite import Item, Suite, SuiteError

_MISSING = object()
_REFERENCE = 64  # a base64 field no longer than this is the index of the row that holds the image
_ABSENT = (None, "", "nan")  # how a table writes "no value"


@dataclass(frozen=True)
class Row:
    """One row of a file; `where` is "FILE line N" for error messages."""

    values: dict[str, Any]
    where: str

    def get(self, *names: str, kind: type | tuple[type, ...] = str, default: Any = _MISSING) -> Any:
        """The value of the first of `names` that the row has. SuiteError when none has one, or when it is of another kind."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), None)
        if value is None:
            if default is not _MISSING:
                return default
            raise SuiteError(f"{self.where}: the field {' or '.join(map(repr, names))} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise SuiteError(
                f"{self.where}: the field {names[0]!r} is {type(value).__name__}, not {' or '.join(k.__name__ for k in kinds)}"
            )
        return value

    def text(self, *names: str) -> str:
        """A string that is more than white space."""
        value = str(self.get(*names, kind=(str, int, float)))
        if not value.strip():
            raise SuiteError(f"{self.where}: the field {names[0]!r} is empty")
        return value

    def number(self, *names: str) -> int:
        """A whole number, also one written as text, as in a table."""
        value = self.get(*names, kind=(str, int, float))
        try:
            number = int(float(value))
            if number == float(value):
                return number
        except (ValueError, OverflowError):
            pass
        raise SuiteError(f"{self.where}: the field {names[0]!r} is {value!r}, not a whole number")

    def optional(self, *names: str) -> str:
        """A string, "" where the table has no value (also written nan)."""
        value = self.get(*names, kind=(str, int, float), default="")
        return "" if value in _ABSENT or value != value else str(value)

    def strings(self, *names: str, spelled: bool = False) -> list[str]:
        """A list of strings; a single one is a list of one. `spelled`: text is the written form of a Python list, as in a table."""
        value, field = self.get(*names, kind=(str, list, int, float)), f"{self.where}: the field {names[0]!r}"
        if isinstance(value, str) and spelled:
            try:
                found = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise SuiteError(f"{field} is not the text of a list: {value[:60]!r}") from error
            if not isinstance(found, list):
                raise SuiteError(f"{field} is {type(found).__name__}, not a list")
            value = found
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        if not values:
            raise SuiteError(f"{field} is an empty list")
        return values


def find(data: Path, folders: Sequence[str], patterns: Sequence[str], files: str) -> list[Path]:
    """Files of the first of `patterns` found in the data directory or in one of its `folders`, sorted. SuiteError saying `files`."""
    if not data.is_dir():
        raise SuiteError(f"the data directory {data} does not exist; it must hold {files}")
    for pattern in patterns:
        for root in (data, *(data / folder for folder in folders)):
            found = sorted(p for p in root.glob(pattern) if p.is_file())
            if found:
                _check_shards(found)
                return found
    raise SuiteError(f"{data} has no {' or '.join(patterns)}; it must hold {files}")


def _check_shards(paths: Sequence[Path]) -> None:
    """SuiteError when files named NAME-00000-of-00003 are fewer than they say: a part would be taken for the whole."""
    shards = [found for found in (re.search(r"-(\d+)-of-(\d+)\.", path.name) for path in paths) if found]
    if shards and {int(s[1]) for s in shards} != set(range(int(shards[0][2]))):
        count = int(shards[0][2])
        raise SuiteError(f"{paths[0].parent} holds {len(shards)} of the {count} files like {paths[0].name}; download the others too")


def read_rows(paths: Path | Iterable[Path]) -> Iterator[Row]:
    """Rows of one file or of the shards of one, by the ending of the name. SuiteError with file and line for what cannot be read."""
    for path in [paths] if isinstance(paths, Path) else paths:
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise SuiteError(f"{path} is of a kind that is not read here; known endings are {', '.join(_READERS)}")
        try:
            yield from reader(path)
        except UnicodeDecodeError as error:
            raise SuiteError(f"{path} is not UTF-8 text (byte {error.start}); download it again") from error
        except OSError as error:
            raise SuiteError(f"{path} cannot be read: {error.strerror or error}") from error


def unique_items(pairs: Iterable[tuple[Item | None, str]]) -> list[Item]:
    """The items of (item, where it was read) pairs, without those that are None.

    Raises:
      SuiteError: there are no items, or two have one id.
    """
    found: dict[str, tuple[Item, str]] = {}
    for item, where in pairs:
        if item is None:
            continue
        if item.id in found:
            raise SuiteError(f"{where}: the id {item.id!r} was used before, at {found[item.id][1]}; ids must be unique")
        found[item.id] = item, where
    if not found:
        raise SuiteError("the file holds no rows for this suite; download it again")
    return [item for item, _ in found.values()]


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SuiteError(f"{where} is not JSON ({error}); fix the line or download the file again") from error
                yield _row(values, where)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; some published files that end in .json hold one object per line instead."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{path} line {getattr(error, 'lineno', 1)} is not JSON ({error}); download the file again") from error
    for number, values in enumerate(entries, 1):
        yield _row(values, f"{path} entry {number}")


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise SuiteError(f"{where} is {type(values).__name__}, not an object with named fields")
    return Row(values, where)


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a base64 image is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if not header:
                raise SuiteError(f"{path} is empty; download it again")
            for fields in rows:
                where = f"{path} line {rows.line_num}"
                if fields and len(fields) != len(header):
                    raise SuiteError(f"{where} has {len(fields)} fields, the header has {len(header)}; fix the line")
                if fields:
                    yield Row(dict(zip(header, fields)), where)
        except csv.Error as error:
            raise SuiteError(f"{path} line {rows.line_num}: {error}; fix the quotes or download the file again") from error


def _parquet(path: Path) -> Iterator[Row]:
    """Rows without their images: a column of image bytes becomes a ParquetImage."""
    arrow = pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        images = [f.name for f in schema if "bytes" in str(f.type) and "struct" in str(f.type)]
        columns = [name for name in schema.names if name not in images]
        number = 0
        for group in range(file.num_row_groups):
            for row, values in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                number += 1
                found = {name: ParquetImage(path, group, row, name) for name in images}
                yield Row(values | found, f"{path} row {number}")
    except arrow.ArrowException as error:
        raise SuiteError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); download it again") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}


# ---- images ----
@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file (a struct of bytes and path, or a list of them); read with its row group, once."""

    path: Path
    group: int
    row: int
    column: str

    def __call__(self) -> Image.Image:
        """The image, RGB. SuiteError when it has no bytes or cannot be decoded."""
        value = _row_group(self.path, self.group, self.column)[self.row].as_py()
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, dict) or not value.get("bytes"):
            raise SuiteError(f"{self} holds no image; download the file again")
        return decode(value["bytes"], str(self))

    def __str__(self) -> str:
        return f"{self.path} row group {self.group} row {self.row + 1}, {self.column}"


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> Any:
    return pyarrow().parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def pyarrow() -> Any:
    """The package, with its parquet reader. SuiteError when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SuiteError("reading parquet needs the package pyarrow: pip install 'xomni_jax[eval]'") from error
    return pyarrow


@dataclass(frozen=True)
class FileImage:
    """An image that lies in a file of its own. `remedy` says where to get it."""

    path: Path
    remedy: str

    def exists(self) -> bool:
        """Whether the file is there, without reading it."""
        return self.path.is_file()

    def __call__(self) -> Image.Image:
        """The image, RGB."""
        if not self.exists():
            raise SuiteError(f"the image {self} is missing")
        return decode(self.path.read_bytes(), str(self.path))

    def __str__(self) -> str:
        return f"{self.path} ({self.remedy})"


def decode_base64(text: str, where: str) -> Image.Image:
    """RGB image held as base64 in a table. SuiteError naming `where`."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SuiteError(f"{where}: the image is not base64; download the file again") from error
    return decode(data, where)


def decode(data: bytes, where: str) -> Image.Image:
    """RGB image of an encoded file. SuiteError naming `where`."""
    try:
        return read_image(data)
    except UnreadableImage as error:
        raise SuiteError(f"{where}: the image cannot be read: {error}; download it again") from error


def rows_with_images(paths: Sequence[Path]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """(row, image) of a table whose column `image` holds the images, or names the row that does."""
    rows, tables = list(read_rows(paths)), {}
    if not isinstance(rows[0].values.get("image") if rows else None, ParquetImage):
        tables = {row.text("index"): row for row in rows}
    for row in rows:
        image = row.values.get("image")
        if image is None:
            raise SuiteError(f"{row.where}: the field 'image' is missing")
        yield row, image if isinstance(image, ParquetImage) else _base64(row, tables)


def _base64(row: Row, tables: dict[str, Row]) -> Callable[[], Any]:
    text = row.text("image")
    source = row if len(text) > _REFERENCE else tables.get(text)
    if source is None or len(source.text("image")) <= _REFERENCE:
        raise SuiteError(f"{row.where}: the image is neither base64 nor the index of a row that holds one: {text!r}")
    return functools.partial(decode_base64, source.text("image"), source.where)


class QuestionTable(Suite):
    """A suite whose questions and images stand together in one published table. A subclass defines `item`.

    Attributes:
      folders: names of the folder below the data directory that may hold the table. patterns: of its files, the first that exist are read.
    """

    task = "answer"
    paper_scale = 100.0
    folders: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def load(self, data: Path) -> list[Item]:
        paths = find(data, self.folders, self.patterns, self.files)
        return unique_items((self.item(row, image), row.where) for row, image in rows_with_images(paths))

    def item(self, row: Row, image: Callable[[], Any]) -> Item | None:
        """The item of a row, None to leave the row out. Raises SuiteError when the row does not fit."""
        raise NotImplementedError
