"""Files of text as tables: lines, JSON lines, a list in JSON, csv and tsv.

Lines end with a line feed alone, since other line separators may stand inside a text; blank lines are no rows.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from xomni_jax.core.config import ConfigError
from xomni_jax.data.tables import FaultyRecord, Table, is_local, readable, stamp

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
_BOM = b"\xef\xbb\xbf"


def open_text(files: Sequence[Path], root: Path) -> Table:
    """The table of one file of text. Whether JSON is a list or lines is decided by the content, the rest by the ending of the name.

    Raises:
      ConfigError: the file cannot be read, is no UTF-8, or is a list or a csv with a fault in it.
    """
    (path,) = files
    if path.suffix == ".txt":
        return LineTable(path, root, lambda line: {"text": line})
    if path.suffix in (".csv", ".tsv"):
        return _csv(path, root)
    with readable(path), path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(_BOM).lstrip()
    if first.startswith(b"["):
        try:
            return ListTable(path, root, json.loads(read_text(path)), lambda n: f"{path}[{n}]", columns)
        except (ValueError, RecursionError) as error:
            if not _is_json(first):
                raise ConfigError(f"{path} is no list in JSON ({error}); correct it") from error
    return LineTable(path, root, lambda line: columns(json.loads(line)))


class LineTable:
    """A file with a row in every line that is not blank. Lines are read when they are asked for; their places are held in memory."""

    def __init__(self, path: Path, root: Path, parse: Callable[[str], dict[str, Any]]):
        self.path, self.root, self.parse = path, root, parse
        self._starts, self._lines, at, content = array("Q"), array("I"), 0, hashlib.sha256()
        with readable(path), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.removeprefix(_BOM).isspace() and line != _BOM:
                    self._starts.append(at)
                    self._lines.append(number)
                at += len(line)
                content.update(line)
        self._starts.append(at)
        self.digest, self._stamp = content.hexdigest(), stamp(path)
        self.notes = [] if self._lines else [f"{path}: holds no records"]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, end = self._starts[number], self._starts[number + 1]
        line = os.pread(_opened(self.path, self._stamp).fileno(), end - start, start).partition(b"\n")[0].removesuffix(b"\r")
        try:
            return self.parse((line.removeprefix(_BOM) if start == 0 else line).decode())
        except UnicodeDecodeError as error:
            raise FaultyRecord(f"{self.where(number)}: it is not UTF-8 text") from error
        except FaultyRecord as fault:
            raise FaultyRecord(f"{self.where(number)}: {fault}") from None
        except (ValueError, RecursionError) as error:
            raise FaultyRecord(f"{self.where(number)}: it is not JSON ({error})") from error

    def where(self, number: int) -> str:
        """File and line."""
        return f"{self.path}:{self._lines[number]}"


class ListTable:
    """Rows that are held in memory.

    Attributes:
      where: the place of a row, by its number.
      parse: makes columns of an entry; its FaultyRecord gives the reason alone.
    """

    def __init__(self, path: Path, root: Path, rows: Sequence[Any], where: Callable[[int], str], parse: Callable[[Any], dict[str, Any]]):
        self.root, self.rows, self.where, self.parse = root, rows, where, parse
        with readable(path):
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.notes = [] if rows else [f"{path}: holds no records"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self.parse(self.rows[number])
        except FaultyRecord as fault:
            raise FaultyRecord(f"{self.where(number)}: {fault}") from None


def columns(value: Any) -> dict[str, Any]:
    """The columns of an entry in JSON; a bare string is the column `text`."""
    if not isinstance(value, (dict, str)):
        raise FaultyRecord("it is no object with named columns")
    return {"text": value} if isinstance(value, str) else value


def _csv(path: Path, root: Path) -> ListTable:
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one field
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header, *cells = [row for row in rows if row] or [[]]
    except csv.Error as error:
        raise ConfigError(f"{path} line {rows.line_num}: {error}; correct the quotes") from error
    if len(header) == 1 and (other := next((mark for mark in ";\t" if mark in header[0]), None)):
        raise ConfigError(f"{path}: its columns are separated by {other!r}; separate them by commas, or by tabs in a .tsv")
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise ConfigError(f"{path}: the header has the column {twice[0]!r} twice; give each a name of its own")

    def parse(row: list[str]) -> dict[str, Any]:
        if len(row) != len(header):
            raise FaultyRecord(f"it has {len(row)} fields, the header has {len(header)}")
        return dict(zip(header, row, strict=True))

    return ListTable(path, root, cells, lambda n: f"{path} row {n + 1}", parse)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark. ConfigError when it cannot be read."""
    with readable(path):
        return path.read_bytes().decode("utf-8-sig")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


@functools.lru_cache(256)
def _opened(path: Path, version: tuple[int, int]) -> BinaryIO:
    """A file as it was at a `stamp`. Forked processes may share it: pread has no position. Of one in a bucket, a copy on this machine."""
    if is_local(path):
        return path.open("rb")
    copy = tempfile.TemporaryFile()
    with path.open("rb") as there:
        shutil.copyfileobj(there, copy)
    copy.flush()
    return copy
