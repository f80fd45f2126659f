"""Tar files as a table: webdataset's layout, as img2dataset and others write it, at random access by an index that is made once.

Members of a sample have one key: folder and base name up to its first dot. The rest of the name is the member's field.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from xomni_jax.data.shards import Recent, Shards
from xomni_jax.data.tables import FaultyRecord, is_local
from xomni_jax.data.tar_index import TarIndex, index_of

_FILES = 256  # open at a time
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_COLUMNS = dict.fromkeys(_IMAGES, "image") | {"txt": "text", "text": "text", "caption": "caption", "cls": "cls", "json": "json"}


class TarTable(Shards[TarIndex]):
    """Samples of tar files: the key, images as bytes, texts, and the columns of a .json member. Other members are bytes.

    What img2dataset writes beside a tar holds no samples; its NAME_stats.json tells whether the tar is whole.
    """

    def __init__(self, files: Sequence[Path], root: Path):
        super().__init__(files, root, index_of)
        self._files = Recent(_open, _FILES)
        stats = {file: file.with_name(f"{file.stem}_stats.json") for file in files}
        with_stats = {file for file, beside in stats.items() if beside.exists()}
        for file, index in self.readable():
            told = _successes(stats[file]) if file in with_stats else None
            if with_stats and file not in with_stats:
                self.notes.append(f"{file}: {len(index)} samples, and no {stats[file].name} beside it: an unfinished shard")
            elif told is not None and told != len(index):
                self.notes.append(f"{file}: {len(index)} samples, but {told} in {stats[file].name}")
            elif not len(index):
                self.notes.append(f"{file}: a tar of no samples")
            self.notes += [f"{file} {note}" for note in index.notes]

    def row(self, file: Path, index: TarIndex, number: int) -> dict[str, Any]:
        """The columns of a sample."""
        members = index.members(number)
        fields = tuple(field for field, _, _ in members)
        if twice := [field for field, times in Counter(fields).items() if times > 1]:
            raise FaultyRecord(f"it has two members {twice[0]}")
        columns: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for (field, _, size), data in zip(members, self._read(file, members), strict=True):
            if len(data) < size:
                raise FaultyRecord(f"its member {field} is cut off")
            name, kind = column_names(fields)[field], _COLUMNS.get(_ending(field), "")
            try:
                value = data if kind in ("", "image") else msgspec.json.decode(data) if kind == "json" else data.decode()
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise FaultyRecord(f"its member {field} is no {'JSON' if kind == 'json' else 'UTF-8 text'} ({error})") from error
            if name == "json" and isinstance(value, dict):
                merged = value
            else:
                columns[name] = value
        return merged | columns | {"key": index.key(number)}

    def place(self, index: TarIndex, number: int) -> str:
        """The sample's key."""
        return index.key(number)

    def _read(self, file: Path, members: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """The bytes of members, in one read where they lie together, as they do unless the tar was made in another order."""
        start, end = members[0][1], sum(members[-1][1:])
        if end - start > 2 * sum(size for _, _, size in members) + 4096 * len(members):
            yield from (self._bytes(file, offset, size) for _, offset, size in members)
        else:
            whole = self._bytes(file, start, end - start)
            yield from (whole[offset - start : offset - start + size] for _, offset, size in members)

    def _bytes(self, file: Path, offset: int, size: int) -> bytes:
        """Threads share an open file of this machine, since pread has no position of its own."""
        if is_local(file):
            return os.pread(self._files(file).fileno(), size, offset)
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)


@functools.lru_cache(1024)
def column_names(fields: tuple[str, ...]) -> dict[str, str]:
    """Fields of a sample -> columns: `image` and `text` whatever the ending is, and what stands before it where that tells several.

    Of "input.jpg" and "output.png" it is `input` and `output`, of "1.jpg" and "2.jpg" `1` and `2`, of "v1.0.png" alone `image`.
    """
    kinds = {field: _COLUMNS.get(_ending(field), "") for field in fields}
    names = {}
    for field, kind in kinds.items():
        before = field.rpartition(".")[0]
        only = list(kinds.values()).count(kind) == 1 and re.fullmatch(r"v?[\d.]*", before)
        names[field] = field if not kind else kind if only else before or kind
    times = Counter(names.values())
    return {field: name if times[name] == 1 else field for field, name in names.items()}


def _ending(field: str) -> str:
    return field.rpartition(".")[2]


def _open(file: Path) -> BinaryIO:
    return file.open("rb")


def _successes(stats: Path) -> int | None:
    """How many samples img2dataset wrote, as its statistics say; None if they do not."""
    try:
        return int(json.loads(stats.read_bytes())["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
