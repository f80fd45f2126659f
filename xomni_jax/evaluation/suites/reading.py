"""Rows of published files, each with its file and line, and the suites that are made of them.

Question tables come as VLMEvalKit publishes them (tsv, images in base64) and as lmms-lab does on Hugging Face (parquet, images as bytes).
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xomni_jax.core.config import ConfigError
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.data.text_tables import TEXT_SUFFIXES, open_text, read_text
from xomni_jax.evaluation.suite import Item, Suite, SuiteError, check_id
from xomni_jax.evaluation.suites.downloads import Download, described
from xomni_jax.evaluation.suites.images import ParquetImage, decode_base64

_MISSING = object()
_REFERENCE = 64  # a base64 field no longer than this is the index of the row that holds the image


@dataclass(frozen=True)
class Row:
    """One row of a file; `where` is "FILE line N" for error messages."""

    values: dict[str, Any]
    where: str

    def get(self, *names: str, kind: type | tuple[type, ...] = str, default: Any = _MISSING) -> Any:
        """The value of the first of `names` that the row has. SuiteError when none has one, or when it is of another kind."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), None)
        if value is None or value != value:  # nan, as tables without a value have it
            if default is not _MISSING:
                return default
            raise SuiteError(f"{self.where}: the field {' or '.join(map(repr, names))} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.wrong(names[0], f"is {type(value).__name__}, not {' or '.join(k.__name__ for k in kinds)}")
        return value

    def text(self, *names: str) -> str:
        """A string that is more than white space; a whole number becomes one."""
        value = str(self.get(*names, kind=(str, int)))
        if not value.strip():
            raise self.wrong(names[0], "is empty")
        return value

    def number(self, *names: str) -> int:
        """A whole number, also one written as text, as in a table."""
        value = self.get(*names, kind=(str, int, float))
        try:
            if isinstance(value, int) or float(value).is_integer():
                return int(value) if isinstance(value, int) else int(float(value))
        except (ValueError, OverflowError):
            pass
        raise self.wrong(names[0], f"is {value!r}, not a whole number")

    def optional(self, *names: str) -> str:
        """A string, "" where the table has no value (also written nan)."""
        value = str(self.get(*names, kind=(str, int, float), default=""))
        return "" if value == "nan" else value

    def strings(self, *names: str, spelled: bool = False) -> list[str]:
        """A list of strings; a single one is a list of one. `spelled`: text is the written form of a Python list, as in a table."""
        value = self.get(*names, kind=(str, list, int, float))
        if isinstance(value, str) and spelled:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise self.wrong(names[0], f"is not the text of a list: {value[:60]!r}") from error
            if not isinstance(value, list):
                raise self.wrong(names[0], f"is {type(value).__name__}, not a list")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.wrong(names[0], "is an empty list")
        for entry in values:
            if not isinstance(entry, (str, int, float)) or isinstance(entry, bool):
                raise self.wrong(names[0], f"holds {str(entry)[:60]}, which is {type(entry).__name__}, not text")
        return [_checked(str(v), self.where) for v in values]

    def file(self, name: str, folder: Path) -> Path:
        """The file below `folder` that a field names. SuiteError when the path leads out of the folder."""
        value = self.text(name)
        if not value.isprintable() or "\\" in value or value.startswith("/") or ".." in value.split("/"):
            raise self.wrong(name, f"is {value!r}, which is not a path inside {folder}")
        return folder / value

    def wrong(self, name: str, what: str) -> SuiteError:
        """The error of a field that does not fit."""
        return SuiteError(f"{self.where}: the field {name!r} {what}")


class PublishedSuite(Suite):
    """A suite of published files.

    Attributes:
      downloads: alternatives, each of them the downloads that it takes together.
      folders: names of the folders below the data directory that may hold the files.
    """

    downloads: Sequence[Sequence[Download]] = ()
    folders: Sequence[str] = ()

    def __init__(self, name: str = "", *how: Any):
        self.files = self.files or described(self.downloads)
        super().__init__(name, *how)

    def find(self, data: Path, *patterns: str) -> list[Path]:
        """Files of the first of `patterns` found in the data directory or one of `folders`, sorted. SuiteError saying what is needed."""
        if not data.is_dir():
            what = "is a file; give the directory that it lies in" if data.exists() else f"does not exist; it must hold {self.files}"
            raise SuiteError(f"the data directory {data} {what}")
        for pattern in patterns:
            for root in (data, *(data / folder for folder in self.folders)):
                if found := sorted(p for p in root.glob(pattern) if p.is_file()):
                    _check_shards(found)
                    return found
        raise SuiteError(f"{data} has no {' or '.join(patterns)}; it must hold {self.files}")


class QuestionTable(PublishedSuite):
    """A suite whose questions and images stand together in one published table. A subclass defines `item`.

    Attributes:
      patterns: of the table's files, the first that exist are read.
    """

    task = "answer"
    paper_scale = 100.0
    patterns: tuple[str, ...] = ()

    def load(self, data: Path) -> list[Item]:
        rows = rows_with_images(self.find(data, *self.patterns))
        return unique_items((self.item(row, image), row.where) for row, image in rows)

    def item(self, row: Row, image: Callable[[], Any]) -> Item | None:
        """The item of a row, None to leave the row out. Raises SuiteError when the row does not fit."""
        raise NotImplementedError


def _check_shards(paths: Sequence[Path]) -> None:
    """SuiteError when files named NAME-00000-of-00003 are fewer than they say: a part would be taken for the whole."""
    shards = [found for found in (re.search(r"-(\d+)-of-(\d+)\.", path.name) for path in paths) if found]
    if shards and {int(s[1]) for s in shards} != set(range(int(shards[0][2]))):
        count = int(shards[0][2])
        raise SuiteError(f"{paths[0].parent} holds {len(shards)} of the {count} files like {paths[0].name}; download the others too")


def unique_items(pairs: Iterable[tuple[Item | None, str]], where: str = "the data") -> list[Item]:
    """The items of (item, where it was read) pairs, without those that are None.

    Raises:
      SuiteError: there are no items, two have one id, or an id cannot be part of a file name.
    """
    found: dict[str, tuple[Item, str]] = {}
    for item, where in pairs:
        if item is None:
            continue
        check_id(item.id, where)
        if item.id in found:
            raise SuiteError(f"{where}: the id {item.id!r} was used before, at {found[item.id][1]}; ids must be unique")
        found[item.id] = item, where
    if not found:
        raise SuiteError(f"{where}: no row up to here belongs to this suite; download the file again")
    return [item for item, _ in found.values()]


# ---- files ----
def read_rows(paths: Path | Iterable[Path]) -> Iterator[Row]:
    """Rows of one file or of the shards of one, by the ending of the name. SuiteError with file and line for what cannot be read."""
    for path in [paths] if isinstance(paths, Path) else paths:
        empty = True
        try:
            for row in _parquet(path) if path.suffix == ".parquet" else _text_rows(path):
                empty = False
                yield row
        except (ConfigError, FaultyRecord) as error:
            raise SuiteError(f"{error}; download the file again") from error
        except OSError as error:
            raise SuiteError(f"{path} cannot be read: {error.strerror or error}") from error
        if empty:
            raise SuiteError(f"{path} holds no rows; download it again")


def _text_rows(path: Path) -> Iterator[Row]:
    if path.suffix not in TEXT_SUFFIXES:
        raise SuiteError(f"{path} is of a kind that is not read here; known endings are {', '.join((*TEXT_SUFFIXES, '.parquet'))}")
    table = open_text([path], path.parent)
    yield from (Row(_checked(table[n], table.where(n)), table.where(n)) for n in range(len(table)))


def read_entries(path: Path) -> Iterator[Row]:
    """Rows of a JSON file that is one object: its keys become the field "id", a value that is no object the field "value"."""
    try:
        found = json.loads(read_text(path))
    except (ConfigError, ValueError, RecursionError) as error:
        raise SuiteError(f"{path} is not JSON ({error}); download the file again") from error
    if not isinstance(found, dict):
        raise SuiteError(f"{path} is {type(found).__name__}, not an object; download it again")
    for id, value in found.items():
        where = f"{path} entry {id!r}"
        yield Row(_checked({**(value if isinstance(value, dict) else {"value": value}), "id": id}, where), where)


def _checked(value: Any, where: str) -> Any:
    """The value. SuiteError when it holds half a surrogate pair: it could be neither shown nor written."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise SuiteError(f"{where}: it holds text that cannot be written ({error}); fix it or download the file again") from error
    return value


def _parquet(path: Path) -> Iterator[Row]:
    """Rows without their images, each of which becomes a ParquetImage."""
    from xomni_jax.data.parquet_table import ParquetTable  # most suites do without pyarrow

    (footer,) = ParquetTable([path], path.parent).indices
    if isinstance(footer, FaultyRecord):
        raise footer
    table = ParquetTable([path], path.parent, [name for name in footer.columns if name not in footer.images])
    images = ParquetTable([path], path.parent, footer.images)
    for n, values in enumerate(table):
        yield Row(values | {name: ParquetImage(images, n, name) for name in footer.images}, table.where(n))


def rows_with_images(paths: Sequence[Path]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """(row, image) of a table whose column `image` holds the images, or names the row that does."""
    rows = list(read_rows(paths))
    inside = isinstance(rows[0].values.get("image"), ParquetImage)
    table = {} if inside else {row.text("index"): row for row in rows}
    for row in rows:
        yield row, row.values["image"] if inside else _base64(row, table)


def _base64(row: Row, table: dict[str, Row]) -> Callable[[], Any]:
    text = row.text("image")
    source = row if len(text) > _REFERENCE else table.get(text)
    if source is None or len(source.text("image")) <= _REFERENCE:
        raise SuiteError(f"{row.where}: the image is neither base64 nor the index of a row that holds one: {text!r}")
    return functools.partial(decode_base64, source.text("image"), source.where)
