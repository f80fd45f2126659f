"""The index of a tar file: where the members of each sample lie. Made in one pass over the headers, and stored."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xomni_jax.data.shards import unreadable
from xomni_jax.data.tables import stamp

_VERSION = 1  # of what is stored


@dataclass
class TarIndex:
    """Where the members of a tar lie.

    Attributes:
      keys: uint8, the samples' keys one after the other; `key_ends` int64 [samples] are their ends.
      member_ends: int64 [samples], members of a sample and of those before it.
      names: of all fields; `field` int32 [members] are the numbers of each member's.
      offset, size: int64 [members], bytes.
      notes: members that are no part of a sample, and the end of a tar that is damaged, to follow the name of the file.
    """

    keys: np.ndarray
    key_ends: np.ndarray
    member_ends: np.ndarray
    names: np.ndarray
    field: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    notes: np.ndarray

    @property
    def content(self) -> bytes:
        """Hash of all but the notes."""
        parts = (self.keys, self.key_ends, self.member_ends, self.names, self.field, self.offset, self.size)
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).digest()

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.keys[_span(self.key_ends, number)].tobytes().decode(errors="surrogateescape")

    def members(self, number: int) -> list[tuple[str, int, int]]:
        """(field, offset, size) of a sample's members, by offset."""
        span = _span(self.member_ends, number)
        names = (str(self.names[n]) for n in self.field[span])
        return list(zip(names, self.offset[span].tolist(), self.size[span].tolist(), strict=True))


def index_of(file: Path) -> TarIndex:
    """The stored index of a tar if it is that of the file as it is now, or else a new one, which is stored.

    It lies beside the file, or in ~/.cache/xomni_jax/tars where that is not allowed. FaultyRecord when the file cannot be read.
    """
    try:
        now = np.array([*stamp(file), _VERSION])
        cached = f"{hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()}.npz"
        places = file.with_name(f".{file.name}.index.npz"), Path.home() / ".cache" / "xomni_jax" / "tars" / cached
        for place in places:
            with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), place.open("rb") as stream:
                stored = np.load(stream)
                if np.array_equal(stored["stamp"], now):
                    return TarIndex(**{part.name: stored[part.name] for part in fields(TarIndex)})
        with file.open("rb") as stream:
            index = _made(stream, int(now[0]))
    except (OSError, tarfile.TarError) as error:
        raise unreadable(file, "tar file", error) from error
    for place in places:
        with suppress(OSError):
            _store(place, index, now)
            break
    return index


def _store(place: Path, index: TarIndex, now: np.ndarray) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        with part.open("wb") as stream:
            np.savez(stream, stamp=now, **vars(index))
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _made(stream: BinaryIO, nbytes: int) -> TarIndex:
    """The index from the headers of a tar of `nbytes` bytes."""
    samples: list[tuple[str, list[tuple[str, int, int]]]] = []
    newest: dict[str, int] = {}  # key -> number of the last sample that has it
    ignored: dict[str, list[str]] = {}
    previous, apart, notes = "", 0, []
    for member in _members(stream, nbytes, notes):
        key, field, reason = split_name(member)
        if reason:
            ignored.setdefault(reason, []).append(member.name)
        if reason is not None:
            continue
        number = newest.get(key)
        if number is None or (key != previous and any(name == field for name, _, _ in samples[number][1])):
            number = newest[key] = len(samples)
            samples.append((key, []))
        elif key != previous:
            apart += 1
        previous = key
        samples[number][1].append((field, member.offset_data, member.size))
    for reason, names in ignored.items():
        notes.append(f"{names[0]}: {reason}: ignored" + (f", as are {len(names) - 1} more" if len(names) > 1 else ""))
    if apart:
        notes.append(f"{apart} members lie apart from others of their key: they are one sample nevertheless")
    return _packed(samples, notes)


def _members(stream: BinaryIO, nbytes: int, notes: list[str]) -> Iterable[tarfile.TarInfo]:
    """The members of a tar up to its end, or to where it is damaged, of which a note is made."""
    if not nbytes:
        return
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        last = "the start"
        try:
            for member in tar:
                last = member.name
                yield member
            stream.seek(tar.offset)
            after = stream.read(tarfile.BLOCKSIZE)
            what = "damaged" if after.strip(b"\0") else "" if after else "without an end mark, perhaps cut off"
        except tarfile.ReadError:
            what = "cut off"
    if what:
        notes.append(f"is {what} after {last}")


def split_name(member: tarfile.TarInfo) -> tuple[str, str, str | None]:
    """(key, field, None) of a member of a sample; of others, why it is none: "" where that is as it should be."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, field = base.partition(".")
    if member.isdir() or any(part.startswith("__") and part.endswith("__") for part in (*folder.split("/"), base)):
        return "", "", ""  # webdataset's own notes lie in __meta__
    if base.startswith("._"):
        return "", "", "AppleDouble file"
    if not stem or "__MACOSX" in folder:
        return "", "", "hidden file"
    if not member.isreg() or member.issparse():
        return "", "", "link or special file"
    if not field:
        return "", "", "name without an ending"
    return f"{folder}/{stem}" if folder else stem, field.lower(), None


def _packed(samples: list[tuple[str, list[tuple[str, int, int]]]], notes: list[str]) -> TarIndex:
    keys = [key.encode(errors="surrogateescape") for key, _ in samples]
    members = [member for _, of_sample in samples for member in of_sample]
    names = list(dict.fromkeys(field for field, _, _ in members))
    numbers = {name: n for n, name in enumerate(names)}
    return TarIndex(
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        member_ends=np.cumsum([len(of_sample) for _, of_sample in samples], dtype=np.int64),
        names=np.array(names, np.str_),
        field=np.array([numbers[field] for field, _, _ in members], np.int32),
        offset=np.array([offset for _, offset, _ in members], np.int64),
        size=np.array([size for _, _, size in members], np.int64),
        notes=np.array(notes, np.str_),
    )


def _span(ends: np.ndarray, number: int) -> slice:
    return slice(int(ends[number - 1]) if number else 0, int(ends[number]))
