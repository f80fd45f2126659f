"""Files of tensors: opening one reads names, shapes and dtypes; values are views of a memory map."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.core.tables import bytes_text

MAX_RANK = 32


class TensorFileError(ConversionError):
    """A file of tensors cannot be read or written. One sentence: the file, the key if one is concerned, and what to do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, known without reading it."""

    file: Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values: the product of `shape`, times the item size."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensor(NamedTuple):
    """A tensor to be written; `make` is called once, when it is written, and returns this dtype and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it will take in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Extent(NamedTuple):
    """Offset of a tensor's first element in the file, and its strides; both in bytes."""

    offset: int
    strides: tuple[int, ...]


class TensorFile:
    """One memory-mapped file of tensors. Subclasses check the bounds of every tensor they find, and then `place` it.

    Args:
      path: the file; every error names it.
      data: its contents, mapped read-only from `path` when not given.

    Attributes:
      infos: {key: TensorInfo}, in the file's order; complete before any value is read.
      others: what the file holds beside tensors, by name.
      tied: {another name of a tensor: its key}, where the file says so.
    """

    def __init__(self, path: str | Path, data: mmap.mmap | bytes | None = None):
        self.path, self.infos, self.tied = Path(path), dict[str, TensorInfo](), dict[str, str]()
        self.others: set[str] = set()
        self.data = map_file(self.path) if data is None else data
        self.extents: dict[str, Extent] = {}

    def place(self, key: str, dtype: np.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None) -> None:
        """Records one tensor, C-ordered if no strides are given; refuses a shape that numpy cannot have, possible for empty tensors."""
        if len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
            raise TensorFileError(
                f"{self.path}: {show(key)} has shape {list(shape)}, too large for any machine; the file is damaged, download it again"
            )
        self.infos[key] = TensorInfo(self.path, key, dtype, shape)
        self.extents[key] = Extent(offset, contiguous_strides(shape, dtype.itemsize) if strides is None else strides)

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a read-only view of the memory map, perhaps strided or unaligned."""
        info, extent = self.infos[key], self.extents[key]
        if info.nbytes == 0:  # nothing to map, and numpy checks an offset at the very end of a buffer against one item
            array = np.empty(info.shape, info.dtype)
        else:
            array = np.ndarray(info.shape, info.dtype, buffer=self.data, offset=extent.offset, strides=extent.strides)
        array.flags.writeable = False
        return array

    def release(self, key: str) -> None:
        """Frees the memory that reading `key` filled. Views stay valid: their pages are read from the file again when touched."""
        info, (offset, strides) = self.infos[key], self.extents[key]
        if isinstance(self.data, mmap.mmap) and info.nbytes:
            end = offset + sum((n - 1) * s for n, s in zip(info.shape, strides, strict=True)) + info.dtype.itemsize
            start = offset - offset % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, start, end - start)


def map_file(path: Path) -> mmap.mmap | bytes:
    """The file's contents as a read-only memory map (b"" for an empty file, which cannot be mapped)."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError:
        raise TensorFileError(f"{path}: {absence(path)}; check the path, or download it again") from None
    except (OSError, ValueError) as e:
        raise TensorFileError(f"{path}: cannot be opened ({e}); give a file that can be read") from None


def absence(path: Path) -> str:
    """Why a file cannot be opened: it is missing, or a link whose target is, as an interrupted download into a cache leaves them."""
    return f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"


def check_links(folder: Path) -> None:
    """Refuses a folder with a broken link, which `is_file` would take for a file that nobody wanted."""
    for path in sorted(folder.iterdir()):
        if not path.exists():
            raise TensorFileError(f"{path}: {absence(path)}; the download is incomplete, download it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in any Unicode encoding, with or without its mark.

    Raises:
      TensorFileError: missing, no JSON object, or a key comes twice, of which `json` would silently keep the last.
    """
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise TensorFileError(f"{path}: {absence(path)}; the directory is incomplete") from None
    except (ValueError, OSError, RecursionError) as e:
        raise TensorFileError(f"{path}: not readable as JSON ({reason(e)}); restore it, or download it again") from None
    if not isinstance(data, dict):
        raise TensorFileError(f"{path}: is no JSON object; restore it, or download it again")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"{key[:80]} comes twice")
        out[key] = value
    return out


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a C-ordered array."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def show(text: str, limit: int = 120) -> str:
    """A key or name from an untrusted file for a message: quoted, printable, on one line, cut to `limit` characters."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def reason(error: Exception, limit: int = 160) -> str:
    """The text of a library's error, printable and on one line."""
    return repr(str(error))[1:-1][:limit]


# ---- writing ----
def write_tensor(file: IO[bytes], tensor: LazyTensor) -> None:
    """Makes one tensor and writes its elements in C order."""
    array = np.ascontiguousarray(tensor.make())
    if array.size:  # uint8, since the buffer protocol does not know bfloat16
        file.write(array.reshape(-1).view(np.uint8).data)


def check_space(path: Path, needed: int) -> None:
    """Refuses to start a write that the disk has no space for."""
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
    if needed > free:
        sizes = f"{bytes_text(needed)} are to be written, {bytes_text(free)} are free"
        raise TensorFileError(f"{path}: {sizes}; free some space or choose another disk")


@contextmanager
def synced_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write into, which is on disk at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
