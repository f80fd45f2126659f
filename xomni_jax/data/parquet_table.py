"""Parquet files as a table, such as Hugging Face's datasets write them: the row group of a row is decoded, and the last ones are kept."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xomni_jax.core.config import ConfigError
from xomni_jax.data.shards import Recent, Shards, first_line, unreadable
from xomni_jax.data.tables import FaultyRecord

_FILES = 16  # open at a time
_BYTES = 2 << 30  # of decoded row groups that a process keeps; one of Hugging Face's is about 100 MB


@dataclass(frozen=True)
class Footer:
    """Names of a file's columns, of those that hold images as structs with bytes, and the numbers of the rows after its row groups."""

    columns: tuple[str, ...]
    images: tuple[str, ...]
    group_ends: tuple[int, ...]

    @property
    def content(self) -> bytes:
        """All of it."""
        return repr(self).encode()

    def __len__(self) -> int:
        return self.group_ends[-1] if self.group_ends else 0


class ParquetTable(Shards[Footer]):
    """Rows of parquet files: images as bytes or as {"bytes", "path"}, lists, structs; None where a row has no value.

    Attributes:
      blocks: int64 [rows], the number of the row group that a row lies in: all of it is decoded for one row.
    """

    def __init__(self, files: Sequence[Path], root: Path, columns: Sequence[str] = ()):
        """Only `columns` are decoded, or all of them if none is named. ConfigError when one of them is in none of the files."""
        super().__init__(files, root, _footer)
        names = sorted({name for _, footer in self.readable() for name in footer.columns})
        if names and (missing := [name for name in columns if name not in names]):
            raise ConfigError(f"{files[0]}: there is no column {', '.join(missing)}; there are {', '.join(names)}")
        for file, footer in self.readable():
            if not len(footer):
                self.notes.append(f"{file}: a shard of no rows")
            if lacking := [name for name in columns or names if name not in footer.columns]:
                self.notes.append(f"{file}: has no column {', '.join(lacking)}, which other shards have")
        self._columns = tuple(columns) or None
        self._files, self._groups = Recent(_open, _FILES), Recent(_group, _BYTES, _nbytes)
        groups = [(1,) if isinstance(footer, FaultyRecord) else np.diff(footer.group_ends, prepend=0) for footer in self.indices]
        self.blocks = np.repeat(np.arange(sum(map(len, groups))), np.concatenate(groups).astype(np.int64))

    def row(self, file: Path, index: Footer, number: int) -> dict[str, Any]:
        """The columns of a row."""
        group = bisect_right(index.group_ends, number)
        at = number - (index.group_ends[group - 1] if group else 0)
        try:
            table = self._groups(self._files(file), group, self._columns)
            return {name: column[at].as_py() for name, column in zip(table.column_names, table.itercolumns(), strict=True)}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise FaultyRecord(f"it cannot be read ({first_line(error)})") from error

    def place(self, index: Footer, number: int) -> str:
        """The row's number in its file."""
        return f"row {number}"


def _open(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file.open("rb"))


def _group(file: pq.ParquetFile, group: int, columns: tuple[str, ...] | None) -> pa.Table:
    return file.read_row_group(group, columns)


def _nbytes(group: pa.Table) -> int:
    return group.nbytes


def _footer(file: Path) -> Footer:
    try:
        with file.open("rb") as stream:
            read = pq.ParquetFile(stream)
            schema = read.schema_arrow
            images = (field.name for field in schema if re.search(r"struct<.*\bbytes: ", str(field.type)))
            rows = (read.metadata.row_group(n).num_rows for n in range(read.num_row_groups))
            return Footer(tuple(schema.names), tuple(images), tuple(itertools.accumulate(rows)))
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "parquet file", error) from error
