"""Codes of images, made once: the folder that `xomni data tokenize` writes, and the source that reads it.

FOLDER/
  source.json      everything that decides the codes: data, tokenizer, model, batch shape; written first
  NAME-00000-of-00012.array_record   one msgpack map per example, by size and then by key: {"key": number of the record, "grid": [Y, X],
                   "codes": bytes, little-endian} and what else the example holds (id, caption, question, ...)
  NAME-00000-of-00012.json   of a finished shard: its bytes and SHA-256, examples of every size, rejected records
  rejected.jsonl   at the end: {"key", "reason"} of every record that could not be used
  index.json       at the end: source.json with the exact counts and all shards
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from xomni_jax.core.config import ConfigError
from xomni_jax.data.sources import ENDLESS, BatchOrder, Example

SETTINGS, INDEX, REJECTED = "source.json", "index.json", "rejected.jsonl"


@dataclass(frozen=True)
class CodesConfig:
    """Codes of images with their captions, as xomni data tokenize wrote them.

    Attributes:
      path: the folder
      sizes: (height, width) in pixels of the images that are learned; empty - every size that the folder holds
    """

    path: str = ""
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name a folder that xomni data tokenize wrote")
        held = [(height, width) for height, width, _ in self.index["sizes"]]
        if not held:
            raise ValueError(f"path={self.path} holds no examples: all records were rejected, as its {REJECTED} says")
        if missing := set(self.sizes) - set(held):
            raise ValueError(f"sizes={self.sizes}: {self.path} holds no images of {missing.pop()}, but only {held}")
        # In the order of the folder, on which the order of the batches depends.
        object.__setattr__(self, "sizes", tuple(size for size in held if size in self.sizes or not self.sizes))

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        """The folder's index.json."""
        return read_index(Path(self.path))

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that made the codes."""
        return self.index["tokenizer"]


class CodeRecords:
    """The examples of a folder in the order of its shards."""

    def __init__(self, options: CodesConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource  # takes a second

        self._folder, self._dtype = Path(options.path), np.dtype(options.index["dtype"])
        self._records = ArrayRecordDataSource([self._folder / shard["file"] for shard in options.index["shards"] if shard["records"]])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Example:
        try:
            return unpacked(self._records[number], self._dtype)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{self._folder}: record {number} is damaged ({first_line(error)}); copy the folder again") from None


class CodesSource:
    """Codes as a source; its batches come in the order of those of the images that the codes were made of."""

    Options: ClassVar[type] = CodesConfig

    def __init__(self, options: CodesConfig, seed: int, batch_size: int):
        self.records, self.seed = CodeRecords(options), seed
        self.fields, self.offered = (frozenset(options.index[name]) for name in ("fields", "offered"))
        self.num_records = len(self.records)
        at, numbers = 0, {size: [] for size in options.sizes}
        for shard in options.index["shards"]:
            for height, width, count in shard["sizes"]:
                numbers.get((height, width), []).append(np.arange(at, at + count))
                at += count
        self.order = BatchOrder({size: np.concatenate(parts) for size, parts in numbers.items()}, seed, batch_size)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        example = self.records[self.order[index][0]]
        if captions := example.pop("captions", None):  # one is drawn, as from the images' files
            example["caption"] = str(np.random.default_rng([self.seed, index]).choice(captions))
        return example

    @classmethod
    def epoch(cls, options: CodesConfig) -> CodeRecords:
        """Every record once."""
        return CodeRecords(options)


def code_dtype(codebook_size: int) -> np.dtype:
    """The number format of stored codes: the smallest that holds all of them."""
    return np.dtype("<u2" if codebook_size <= 1 << 16 else "<u4")


def packed(key: int, example: Mapping[str, Any], codes_YX: np.ndarray, dtype: np.dtype) -> bytes:
    """A record of a shard. Arrays other than the codes, and further images, are left out."""
    more = {name: value for name, value in example.items() if name != "images" and not isinstance(value, np.ndarray)}
    return msgspec.msgpack.encode({"key": key, "grid": codes_YX.shape, "codes": codes_YX.astype(dtype).tobytes()} | more)


def unpacked(record: bytes, dtype: np.dtype) -> Example:
    """The example of a record: codes [Y, X], and what else it holds but its key."""
    example = msgspec.msgpack.decode(record)
    del example["key"]
    return example | {"codes": np.frombuffer(example["codes"], dtype).reshape(example.pop("grid"))}


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes an ArrayRecord file of single records, for random access. OSError when it cannot be written; then there is no file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path.parent}: a shard cannot be written ({first_line(error)}); mend that, the same command goes on") from None


def read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a folder of codes.

    Raises:
      ConfigError: it is no such folder, the job that writes it has not finished, or a shard is missing or cut off.
    """
    if not (folder / INDEX).is_file():
        why = f"holds no {INDEX}; name a folder that xomni data tokenize wrote"
        if (folder / SETTINGS).is_file():
            why = "is not finished; run the same xomni data tokenize again"
        raise ConfigError(f"config.data.path={folder} {why}")
    try:
        index = json.loads((folder / INDEX).read_text())
        index["fields"], index["offered"], index["tokenizer"], index["dtype"]  # which another version may lack
        wrong = [shard["file"] for shard in index["shards"] if (folder / shard["file"]).stat().st_size != shard["bytes"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{INDEX} is damaged"
        raise ConfigError(f"config.data.path={folder}: {why}; copy the folder again") from None
    if wrong:
        raise ConfigError(f"config.data.path={folder}: {wrong[0]} is cut off or was replaced; copy it again")
    return index


def first_line(error: Exception) -> str:
    """What went wrong, without the trace that the ArrayRecord library appends."""
    return str(error).strip().splitlines()[0].split(";")[0] if str(error).strip() else type(error).__name__
