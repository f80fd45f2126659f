"""Rows of the files that people have, by number: what every file format offers, before its columns are given a meaning.

A row's number is its position in the files, in natural order of their names. A row that cannot be read keeps its number, so that neither
a fault nor the number of hosts moves the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from xomni_jax.core.config import ConfigError


class FaultyRecord(ValueError):
    """A record that cannot be used. The message is one sentence: file and line (or row, key, position), and the reason."""


class Table(Protocol):
    """Rows of one file or of several of one format.

    A table that has to read several rows for one also has `blocks`, int64 [rows]: the number of those that are read together with a row.

    Attributes:
      root: the folder to which paths in the rows are relative unless the configuration names another.
      notes: what is no record and yet should be listed, a sentence each: a shard without rows, an ignored member, an unfinished file.
      digest: hash of the index, equal on every host; a run that resumes with another one is refused.
    """

    root: Path
    notes: list[str]
    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Columns of a row: text, numbers, lists, objects, and bytes of images. FaultyRecord when it cannot be read."""
        ...

    def where(self, number: int) -> str:
        """The place of a row for messages, such as "train.jsonl:4", "train.parquet row 4" or "00000.tar 000000004"."""
        ...


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What keeps a file from being read becomes a ConfigError that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8; save it as UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def stamp(file: Path) -> tuple[int, int]:
    """(bytes, time of the last change) of a file: whether it is still the one that was indexed."""
    if is_local(file):
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    there = file.stat()
    return there.length, there.mtime


def path_of(name: str) -> Path:
    """The path of a name that a user gives: a local one, or one in a bucket, such as gs://name/folder, which opens in the same way."""
    return epath.Path(name) if "://" in name else Path(name)


def is_local(file: Path) -> bool:
    """Whether a path is one of this machine, not of a bucket."""
    return "://" not in os.fspath(file)
