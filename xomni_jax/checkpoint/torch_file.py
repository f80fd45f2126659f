"""PyTorch's zip files (.pth, .pt, .bin): read without torch and without running anything of them, and written so that torch reads them.

Such a file holds a pickle that names the tensors (`torch_pickle` interprets it) and one stored entry of raw bytes per storage, which is
used where it lies, as a memory map. Several tensors may share a storage; strides and offsets are kept.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from xomni_jax.checkpoint.tensor_file import (
    LazyTensor,
    MappedFile,
    Place,
    TensorFileError,
    as_lazy,
    check_space,
    contiguous_strides,
    part_file,
    publish,
    show,
    write_tensor,
)  # fmt: skip
from xomni_jax.checkpoint.torch_names import DTYPES, STORAGES, UNTYPED, Bag, Table, Tensor, name_of
from xomni_jax.checkpoint.torch_pickle import instruction_limit, unpickle
from xomni_jax.checkpoint.zip_directory import ZipDirectory

MAX_DEPTH = 64
MAX_KEY = 1000


class TorchFile(MappedFile):
    """A readable zip file of torch.save.

    Keys: nested dicts are joined with dots and lists count from 0, so {"model": {"a": t}, "ema": [t]} has "model.a" and "ema.0"; a
    wrapper such as "state_dict" stays in the keys. Values that are no tensors (epochs, options, versions) are left out.

    Raises:
      TensorFileError: at construction: not such a file, damaged, compressed, big-endian, or its pickle asks for more than weights.
    """

    def __init__(self, path: str | Path, data: mmap.mmap | bytes | None = None):
        super().__init__(path, data)
        archive = ZipDirectory(self.path, self.data)
        root = archive_root(archive)
        if (order := archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.entries else b"little") != b"little":
            raise archive.error(f"its byte order is {order[:20]!r}, only little is read", "save it again on a little-endian machine")
        program = archive.read(f"{root}data.pkl")
        top = unpickle(program, f"{self.path}: its pickle", len(self.data))
        for key, tensor in Walk(self.path, 1000 + min(len(program), instruction_limit(len(self.data)))).leaves(top):
            if key in self.infos:
                raise TensorFileError(f"{self.path}: two tensors are called {show(key)}; rename one and save again")
            self._add(key, tensor, archive, f"{root}data/{tensor.storage.key}")
        if not self.infos:
            raise TensorFileError(f"{self.path}: holds no tensor under a name ({name_of(top)}); give a file of a state_dict")

    def _add(self, key: str, tensor: Tensor, archive: ZipDirectory, entry: str) -> None:
        """Places one tensor, whose storage must be there in the promised size."""
        if entry not in archive.entries:
            raise archive.error(f"{show(key)} lies in {show(entry)}, which is not in the file")
        start, size = archive.span(entry)
        if size != tensor.storage.nbytes:
            raise archive.error(f"{show(key)} lies in {show(entry)} of {size} bytes, its pickle says {tensor.storage.nbytes}")
        width, count = tensor.dtype.itemsize, math.prod(tensor.shape)
        if count * width > len(self.data):
            what = f"{show(key)} is an expanded view, {tensor.dtype.name}{list(tensor.shape)} of {size} stored bytes"
            raise archive.error(what, "save it again after .contiguous()")
        strides = contiguous_strides(tensor.shape, width)
        if count:  # strides of single rows mean nothing and may be any number
            strides = tuple(s * width if n > 1 else c for n, s, c in zip(tensor.shape, tensor.strides, strides, strict=True))
        self.place(key, tensor.dtype, tensor.shape, Place(start + tensor.offset * width, strides))


def archive_root(archive: ZipDirectory) -> str:
    """The folder inside the archive that torch.save put everything into, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in archive.entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        kind = " (it is a numpy .npz)" if any(name.endswith(".npy") for name in archive.entries) else ""
        raise archive.error(
            f"is a zip archive with {len(roots)} data.pkl, torch.save writes one{kind}", "give a file written by torch.save or safetensors"
        )
    if any(name.startswith((f"{roots[0]}code/", f"{roots[0]}constants.pkl")) for name in archive.entries):
        raise archive.error("is a TorchScript program", "save the module's state_dict with torch.save or as safetensors")
    return roots[0]


class Walk:
    """Finds the tensors in what the pickle described.

    Args:
      path: names the file in errors.
      limit: the most objects to look at; containers that hold each other many times over have exponentially many paths.
    """

    def __init__(self, path: Path, limit: int):
        self.path, self.left = path, limit

    def error(self, what: str) -> TensorFileError:
        """An error that names the file."""
        return TensorFileError(f"{self.path}: {what}; save a plain state_dict, or safetensors")

    def leaves(self, value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(dotted key, tensor) in the file's order."""
        self.left -= 1 + len(key) // 64
        if self.left < 0 or depth > MAX_DEPTH or len(key) > MAX_KEY:
            raise self.error(f"its containers are nested too deep, too often or under too long keys at {show(key)}")
        if type(value) is Tensor and key:
            yield key, value
        elif type(value) is Table:
            for name, child in zip(value[::2], value[1::2], strict=True):
                yield from self.leaves(child, self.join(key, name, child), depth + 1)
        elif type(value) in (list, tuple):
            for i, child in enumerate(value):
                yield from self.leaves(child, self.join(key, i, child), depth + 1)
        elif type(value) is Bag and any(type(child) in (Tensor, tuple) for child in value):
            raise self.error(f"{show(key)} is a set, whose tensors have no names")

    def join(self, key: str, name: Any, child: Any) -> str:
        """The child's key. Names are text or counted; others only matter if a tensor may lie below."""
        if type(name) is int and abs(name) < 2**63:
            name = str(name)
        if type(name) is not str:
            if type(child) in (Tensor, Table, Bag, list, tuple):
                raise self.error(f"{show(key)} has a key that is a {name_of(name)}")
            return key
        return f"{key}.{name}" if key else name


# ---- writing ----
ROOT = "archive"
ALIGNMENT = 64  # as torch: aligned data can be used in place by any vector instruction
ZIP64_BYTES = 2**30
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def write_torch_file(path: str | Path, tensors: Mapping[str, np.ndarray | LazyTensor]) -> None:
    """Writes a state_dict as torch.save would: loaded by torch.load(weights_only=True), with mmap=True as well. Needs no torch.

    One tensor at a time is made and written, each into a storage of its own. `path` appears only when all of it is on disk.

    Raises:
      TensorFileError: a dtype that torch has not, a LazyTensor that breaks its promise, or not enough space on the disk (before the start).
    """
    path, lazy = Path(path), as_lazy(tensors)
    for key, tensor in lazy.items():
        if tensor.dtype not in NAME_OF:
            raise TensorFileError(f"{path}: torch has no dtype for {show(key)} of dtype {tensor.dtype}; cast it first")
    check_space(path.parent, sum(t.nbytes + 512 for t in lazy.values()))
    with part_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            write_entry(archive, "data.pkl", state_dict_pickle(lazy))
            write_entry(archive, "byteorder", b"little")
            for i, (key, tensor) in enumerate(lazy.items()):
                with open_entry(archive, f"data/{i}", tensor.nbytes) as entry:
                    write_tensor(entry, path, key, tensor)
            write_entry(archive, "version", b"3\n")
    publish(path)


def open_entry(archive: zipfile.ZipFile, name: str, nbytes: int) -> IO[bytes]:
    """A new entry of known size whose data start at a multiple of `ALIGNMENT`."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # dated 1980: equal tensors give equal files
    info.file_size, wide = nbytes, nbytes > ZIP64_BYTES
    start = archive.start_dir + 30 + len(info.filename) + 20 * wide  # 20 bytes: zipfile's own extra field, put before ours
    pad = (-start - 4) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
    return archive.open(info, "w", force_zip64=wide)


def write_entry(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A small entry."""
    with open_entry(archive, name, len(data)) as entry:
        entry.write(data)


def state_dict_pickle(tensors: Mapping[str, LazyTensor]) -> bytes:
    """The pickle (protocol 2) of an OrderedDict of tensors, the i-th in storage `data/i`."""
    empty = global_code("collections", "OrderedDict") + b")R"
    out = [b"\x80\x02", empty, b"("]
    for i, (key, tensor) in enumerate(tensors.items()):
        name, count = STORAGE_OF.get(tensor.dtype), math.prod(tensor.shape)
        kind = global_code("torch", name) if name else global_code(*UNTYPED.rsplit(".", 1))
        out += [text_code(key), global_code("torch._utils", "_rebuild_tensor_v2" if name else "_rebuild_tensor_v3"), b"("]
        out += [b"(", text_code("storage"), kind, text_code(str(i)), text_code("cpu"), int_code(count if name else tensor.nbytes), b"tQ"]
        strides = contiguous_strides(tensor.shape, 1)
        out += [int_code(0), b"(", *map(int_code, tensor.shape), b"t(", *map(int_code, strides), b"t\x89", empty]
        out += [b"" if name else global_code("torch", NAME_OF[tensor.dtype]), b"tR"]  # newer dtypes have no storage type
    return b"".join([*out, b"u."])


def global_code(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def text_code(text: str) -> bytes:
    """BINUNICODE."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def int_code(value: int) -> bytes:
    """BININT, or LONG1 of 8 bytes."""
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
