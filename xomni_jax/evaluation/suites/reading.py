"""Rows of the published files: jsonl, json, csv, tsv and parquet, each row knowing its file and line, pictures read when asked for."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import Item, SuiteError

_MISSING = object()
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
        value = self.get(*names, kind=(str, list, int, float))
        if isinstance(value, str) and spelled:
            value = literal_list(value, self.where, names[0])
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        if not values:
            raise SuiteError(f"{self.where}: the field {names[0]!r} is an empty list")
        return values


def literal_list(text: str, where: str, name: str) -> list[Any]:
    """The Python list that `text` spells. SuiteError otherwise; nothing is executed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise SuiteError(f"{where}: the field {name!r} is not the text of a list: {text[:60]!r}") from error
    if not isinstance(value, list):
        raise SuiteError(f"{where}: the field {name!r} is {type(value).__name__}, not a list")
    return value


def find(data: Path, folders: Sequence[str], patterns: Sequence[str], files: str) -> list[Path]:
    """Files of the first of `patterns` found in the data directory or in one of its `folders`, sorted. SuiteError saying `files`."""
    data = Path(data)
    if not data.is_dir():
        raise SuiteError(f"the data directory {data} does not exist; it must hold {files}")
    for pattern in patterns:
        for root in (data, *(data / folder for folder in folders)):
            found = sorted(p for p in root.glob(pattern) if p.is_file())
            if found:
                return found
    raise SuiteError(f"{data} has no {' or '.join(patterns)}; it must hold {files}")


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


def check_unique(items: Sequence[tuple[Item, str]]) -> list[Item]:
    """The items of (item, where) pairs. SuiteError when there are none or when two have one id."""
    if not items:
        raise SuiteError("the file holds no rows for this suite; download it again")
    seen: dict[str, str] = {}
    for item, where in items:
        if item.id in seen:
            raise SuiteError(f"{where}: the id {item.id!r} was used before, at {seen[item.id]}; ids must be unique")
        seen[item.id] = where
    return [item for item, _ in items]


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SuiteError(f"{where} is not JSON ({error}); mend the line or download the file again") from error
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
    csv.field_size_limit(sys.maxsize)  # a base64 picture is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if not header:
                raise SuiteError(f"{path} is empty; download it again")
            for fields in rows:
                where = f"{path} line {rows.line_num}"
                if fields and len(fields) != len(header):
                    raise SuiteError(f"{where} has {len(fields)} fields, the header has {len(header)}; mend the line")
                if fields:
                    yield Row(dict(zip(header, fields)), where)
        except csv.Error as error:
            raise SuiteError(f"{path} line {rows.line_num}: {error}; mend the quotes or download the file again") from error


def _parquet(path: Path) -> Iterator[Row]:
    """Rows without their pictures: a column of image bytes becomes a ParquetPicture."""
    pyarrow = _pyarrow()
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        pictures = [f.name for f in schema if "bytes" in str(f.type) and "struct" in str(f.type)]
        columns = [name for name in schema.names if name not in pictures]
        number = 0
        for group in range(file.num_row_groups):
            for row, values in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                number += 1
                found = {name: ParquetPicture(path, group, row, name) for name in pictures}
                yield Row(values | found, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise SuiteError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); download it again") from error


@dataclass(frozen=True)
class ParquetPicture:
    """A picture inside a parquet file (a struct of bytes and path, or a list of them); read with its row group, once."""

    path: Path
    group: int
    row: int
    column: str

    def __call__(self) -> Image.Image:
        """The picture, RGB. SuiteError when it has no bytes or cannot be decoded."""
        value = _row_group(self.path, self.group, self.column)[self.row].as_py()
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, dict) or not value.get("bytes"):
            raise SuiteError(f"{self} holds no picture; download the file again")
        return decode(value["bytes"], str(self))

    def __str__(self) -> str:
        return f"{self.path} row group {self.group} row {self.row + 1}, {self.column}"


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> Any:
    return _pyarrow().parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SuiteError("reading parquet needs the package pyarrow: pip install 'xomni_jax[eval]'") from error
    return pyarrow


@dataclass(frozen=True)
class FilePicture:
    """A picture that lies in a file of its own. `mend` says where a user gets it."""

    path: Path
    mend: str

    def exists(self) -> bool:
        """Whether the file is there, without reading it."""
        return self.path.is_file()

    def __call__(self) -> Image.Image:
        """The picture, RGB."""
        if not self.exists():
            raise SuiteError(f"the picture {self} is missing")
        return decode(self.path.read_bytes(), str(self.path))

    def __str__(self) -> str:
        return f"{self.path} ({self.mend})"


def base64_picture(text: str, where: str) -> Callable[[], Image.Image]:
    """A picture held as base64 in a table."""

    def open_picture() -> Image.Image:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SuiteError(f"{where}: the picture is not base64; download the file again") from error
        return decode(data, where)

    return open_picture


def decode(data: bytes, where: str) -> Image.Image:
    """RGB picture of an encoded file. SuiteError naming `where`."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SuiteError(f"{where}: the picture cannot be read ({type(error).__name__}); download it again") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}
