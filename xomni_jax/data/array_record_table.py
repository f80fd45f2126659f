"""ArrayRecord files as a table: records are msgpack maps or tf.Example, which no file says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from array_record.python import array_record_module

from xomni_jax.core.config import ConfigError
from xomni_jax.data.shards import Recent, Shards, first_line, unreadable
from xomni_jax.data.tables import FaultyRecord, stamp

_FILES = 256  # open at a time
_TRIED = 8  # records of which one must tell the codec, since the first may be faulty

Decode = Callable[[bytes], dict[str, Any]]


@dataclass(frozen=True)
class Counted:
    """Records of a file, how many of them are compressed together, and bytes of the file."""

    records: int
    group_size: int
    size: int

    @property
    def content(self) -> bytes:
        """All of it."""
        return repr(self).encode()

    def __len__(self) -> int:
        return self.records


class ArrayRecordTable(Shards[Counted]):
    """Rows of ArrayRecord files."""

    def __init__(self, files: Sequence[Path], root: Path, decode: str | Decode = ""):
        """`decode` makes the columns of a record's bytes: a name in `CODECS`, or a function that can be pickled; empty: the one that fits.

        Raises:
          ConfigError: its records are of no codec.
        """
        super().__init__(files, root, _count)
        self._readers = Recent(_open, _FILES)
        self.notes += [f"{file}: a shard of no records" for file, index in self.readable() if not len(index)]
        if slow := [(file, index.group_size) for file, index in self.readable() if index.group_size > 1]:
            more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
            self.notes.append(
                f"{slow[0][0]}{more}: written in groups of {slow[0][1]} records, which are decompressed together to read one of them; "
                "write them with group_size:1"
            )
        self._decode = decode if callable(decode) else CODECS[decode] if decode else self._found_codec()

    def row(self, file: Path, index: Counted, number: int) -> dict[str, Any]:
        """The columns of a record."""
        return self._decode(self._record(file, number))

    def place(self, index: Counted, number: int) -> str:
        """The record's number in its file."""
        return f"record {number}"

    def _record(self, file: Path, number: int) -> bytes:
        try:
            return self._readers(file).read([number])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise FaultyRecord(f"it cannot be read ({first_line(error)})") from error

    def _found_codec(self) -> Decode:
        """The codec that reads one of the first records."""
        first = next(((file, index) for file, index in self.readable() if len(index)), None)
        if first is None:
            return from_msgpack
        records = [self._record(first[0], n) for n in range(min(_TRIED, len(first[1])))]
        found = next((decode for decode in CODECS.values() if any(_reads(decode, record) for record in records)), None)
        if found is None:
            raise ConfigError(f"{first[0]}: its first records are neither msgpack maps nor tf.Example; write them as one of these")
        return found


def from_msgpack(record: bytes) -> dict[str, Any]:
    """A msgpack map -> its entries."""
    try:
        return msgspec.msgpack.decode(record, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FaultyRecord(f"not msgpack, or no map with named columns ({error})") from error


def from_example(record: bytes) -> dict[str, Any]:
    """A tf.Example -> its features: a list where there are several values, None where there is none; bytes that are text as text."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # takes a second, which other records need not wait for

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise FaultyRecord("not a tf.Example") from error
    if not features:
        raise FaultyRecord("not a tf.Example, or one without features")
    columns: dict[str, Any] = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = [as_text(value) for value in getattr(feature, kind).value] if kind else []
        columns[name] = values if len(values) > 1 else values[0] if values else None
    return columns


CODECS: dict[str, Decode] = {"msgpack": from_msgpack, "example": from_example}


def as_text(value: Any) -> Any:
    """Bytes as text if they are UTF-8 without control characters, which encoded images are not."""
    if not isinstance(value, bytes) or re.search(rb"[\0-\x08]", value):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _reads(decode: Decode, record: bytes) -> bool:
    try:
        decode(record)
    except FaultyRecord:
        return False
    return True


def _open(file: Path) -> array_record_module.ArrayRecordReader:
    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access, as its documentation says
    return array_record_module.ArrayRecordReader(os.fspath(file), options=options, file_reader_buffer_size=1 << 15)


def _count(file: Path) -> Counted:
    try:
        size = stamp(file)[0]
        reader = _open(file)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(file, "array_record file", error) from error
    if not reader.ok():  # a file that is cut off says that it has 0 records
        raise unreadable(file, "array_record file")
    grouped = re.search(r"group_size:(\d+)", reader.writer_options_string())
    return Counted(reader.num_records(), int(grouped[1]) if grouped else 1, size)
