"""Answers of scoring services that a run keeps, so that a step that is repeated after a restart asks about nothing twice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from xomni_jax.rewards.protocol import Item, Score


def answer_key(about: Any, images: Sequence[bytes], items: Sequence[Item]) -> bytes:
    """A hash of images that are scored together, of what they were asked to be, and of whatever else their scores depend on."""
    whole = hashlib.blake2b(msgspec.json.encode((about, items), order="deterministic"), digest_size=16)
    for image in images:
        whole.update(hashlib.blake2b(image, digest_size=16).digest())
    return whole.digest()


class Answers:
    """The newest `limit` answers, in a file that outlives a killed process. One process at a time may have it open.

    The file is made when the first answer is looked for. It holds nothing that cannot be asked again: one that is damaged is replaced,
    and where it cannot be read or written, nothing is found and nothing kept.
    """

    def __init__(self, file: Path, limit: int):
        self._file, self._limit = file, limit

    def find(self, key: bytes) -> list[Score] | None:
        """The scores that were kept under a key."""
        with contextlib.suppress(sqlite3.Error, OSError):
            if row := self._database.execute("SELECT scores FROM answers WHERE key = ?", (key,)).fetchone():
                return msgspec.msgpack.decode(row[0], type=list[Score])
        return None

    def keep(self, answers: dict[bytes, Sequence[Score]]) -> None:
        """Keep scores under their keys, and forget the oldest beyond the limit."""
        with contextlib.suppress(sqlite3.Error, OSError), self._database as database:
            rows = ((key, msgspec.msgpack.encode(scores)) for key, scores in answers.items())
            database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            database.execute("DELETE FROM answers WHERE rowid <= (SELECT max(rowid) FROM answers) - ?", (self._limit,))

    def close(self) -> None:
        """Closes the file; it is opened again when it is needed."""
        if database := self.__dict__.pop("_database", None):
            database.close()

    @functools.cached_property
    def _database(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(sqlite3.DatabaseError):
            return self._open()
        self._file.unlink()
        return self._open()

    def _open(self) -> sqlite3.Connection:
        # Without locks, which some network file systems do not have: the directory of a run is locked as a whole.
        database = sqlite3.connect(f"{self._file.resolve().as_uri()}?nolock=1", uri=True, check_same_thread=False)
        database.execute("PRAGMA synchronous = OFF")  # the process may die; after a crash of the machine the file may have to go
        database.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, scores BLOB)")
        return database
