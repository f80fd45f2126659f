"""PyTorch's zip files (.pth, .pt, .bin): read without torch and without running anything in them, and written so that torch reads them.

Such a file holds a pickle that names the tensors (`torch_pickle` reads it) and one uncompressed entry of raw bytes per storage, which is
memory-mapped. Several tensors may share a storage; strides and offsets are kept.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from xomni_jax.checkpoint.tensor_file import (
    LazyTensor,
    TensorFile,
    TensorFileError,
    contiguous_strides,
    reason,
    show,
    synced_file,
    write_tensor,
)
from xomni_jax.checkpoint.torch_pickle import DTYPES, STORAGES, UNTYPED, Bag, Pairs, Tensor, instruction_limit, name_of, unpickle

MAX_DEPTH = 64
MAX_KEY = 1000
DAMAGED = "the file is damaged or cut off; download it again, or save it again with torch.save"


class TorchFile(TensorFile):
    """A readable zip file of torch.save.

    Keys: nested dicts are joined with dots and lists count from 0, so {"model": {"a": t}, "ema": [t]} has "model.a" and "ema.0"; a
    wrapper such as "state_dict" stays in the keys. Values that are not tensors (epochs, options, versions) are named in `others`.

    Raises:
      TensorFileError: at construction: not such a file, damaged, compressed, big-endian, or its pickle asks for more than weights.
    """

    def __init__(self, path: str | Path, data: mmap.mmap | bytes | None = None):
        super().__init__(path, data)
        self.spans = self._spans()
        root = self._root()
        order = self._entry(f"{root}byteorder") if f"{root}byteorder" in self.spans else b"little"
        if order != b"little":
            raise self._error(f"its byte order is {order[:20]!r}, only little is read; save it again on a little-endian machine")
        program, limit = self._entry(f"{root}data.pkl"), instruction_limit(len(self.data))
        top = unpickle(program, f"{self.path}: its pickle", limit)
        try:
            tensors = list(named_tensors(top, 1000 + min(len(program), limit)))
        except (TypeError, ValueError) as e:
            raise self._error(f"{e}; save a plain state_dict, or safetensors") from None
        for key, tensor in tensors:
            self._add(key, tensor, f"{root}data/{tensor.storage.key}")
        if type(top) is Pairs:
            parts = {key.split(".")[0] for key in self.infos}
            self.others = {name for name, value in top.items if type(name) is str and name.split(".")[0] not in parts}
        if not self.infos:
            raise self._error(f"holds no tensor under a name ({name_of(top)}); give a file of a state_dict")

    def _error(self, what: str) -> TensorFileError:
        return TensorFileError(f"{self.path}: {what}")

    def _spans(self) -> dict[str, tuple[int, int, bool]]:
        """{entry of the archive: (offset, size, whether it is compressed)}."""
        spans, end = {}, 0
        try:
            with zipfile.ZipFile(self.path if isinstance(self.data, mmap.mmap) else io.BytesIO(self.data)) as archive:
                if self.data[-22:-18] != b"PK\5\6":
                    raise zipfile.BadZipFile("it does not end with a zip directory")
                for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                    archive.open(info).close()  # checks the entry's own header
                    name, extra = struct.unpack_from("<2H", self.data, info.header_offset + 26)
                    start = info.header_offset + 30 + name + extra
                    if info.header_offset < end:  # also how a small "zip bomb" lets many names share the same bytes
                        raise zipfile.BadZipFile(f"entry {show(info.filename)} overlaps another")
                    end = start + info.compress_size
                    if end > archive.start_dir:
                        raise zipfile.BadZipFile(f"entry {show(info.filename)} reaches beyond the data")
                    spans[info.filename] = start, info.compress_size, info.compress_type != zipfile.ZIP_STORED
        except Exception as e:  # noqa: BLE001 - zipfile raises a dozen kinds for damaged bytes
            raise self._error(f"its zip archive cannot be read ({reason(e)}); {DAMAGED}") from None
        return spans

    def _root(self) -> str:
        """The folder inside the archive that torch.save put everything into, with its slash."""
        roots = [name.removesuffix("data.pkl") for name in self.spans if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            kind = " (it is a numpy .npz)" if any(name.endswith(".npy") for name in self.spans) else ""
            what = f"is a zip archive with {len(roots)} data.pkl, torch.save writes one{kind}"
            raise self._error(f"{what}; give a file written by torch.save or safetensors")
        if any(name.startswith((f"{roots[0]}code/", f"{roots[0]}constants.pkl")) for name in self.spans):
            raise self._error("is a TorchScript program; save the module's state_dict with torch.save or as safetensors")
        return roots[0]

    def _stored(self, entry: str) -> tuple[int, int]:
        """(offset, size) of an entry's bytes in the file."""
        start, size, compressed = self.spans[entry]
        if compressed:
            raise self._error(f"its entry {show(entry)} is compressed; save it again with torch.save, which stores entries as they are")
        return start, size

    def _entry(self, entry: str) -> bytes:
        start, size = self._stored(entry)
        return bytes(self.data[start : start + size])

    def _add(self, key: str, tensor: Tensor, entry: str) -> None:
        """Records one tensor, whose storage must exist and have the size that the pickle states."""
        if key in self.infos:
            raise self._error(f"two tensors are called {show(key)}; rename one and save again")
        if entry not in self.spans:
            raise self._error(f"{show(key)} lies in {show(entry)}, which is not in the file; {DAMAGED}")
        start, size = self._stored(entry)
        if size != tensor.storage.nbytes:
            raise self._error(f"{show(key)} lies in {show(entry)} of {size} bytes, its pickle says {tensor.storage.nbytes}; {DAMAGED}")
        width, count = tensor.dtype.itemsize, math.prod(tensor.shape)
        if count * width > len(self.data):
            what = f"{show(key)} is an expanded view, {tensor.dtype.name}{list(tensor.shape)} of {size} stored bytes"
            raise self._error(f"{what}; save it again after .contiguous()")
        strides = contiguous_strides(tensor.shape, width)
        if count:  # strides of single rows mean nothing and may be any number
            strides = tuple(s * width if n > 1 else c for n, s, c in zip(tensor.shape, tensor.strides, strides, strict=True))
        self.place(key, tensor.dtype, tensor.shape, start + tensor.offset * width, strides)


def named_tensors(top: Any, limit: int) -> Iterator[tuple[str, Tensor]]:
    """(dotted key, tensor) of every tensor in the unpickled object, in its order.

    Args:
      limit: the most objects to look at; containers that hold each other many times over have exponentially many paths.

    Raises:
      ValueError, TypeError: nested too deep, or a tensor without a name.
    """

    def walk(key: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal limit
        limit -= 1 + len(key) // 64
        if limit < 0 or depth > MAX_DEPTH or len(key) > MAX_KEY:
            raise ValueError(f"its containers are nested too deep, too often or under too long keys at {show(key)}")
        if type(value) is Tensor and key:
            yield key, value
        elif type(value) in (Pairs, list, tuple):
            for name, child in value.items if type(value) is Pairs else enumerate(value):
                yield from walk(joined(key, name, child), child, depth + 1)
        elif type(value) is Bag:
            for child in value.items:
                for _ in walk(key or "its set", child, depth + 1):
                    raise ValueError(f"{show(key)} is a set, whose tensors have no names")

    return walk("", top, 0)


def joined(key: str, name: Any, child: Any) -> str:
    """The dotted key of a child. Its name must be text or an integer if a tensor may lie below it."""
    if type(name) is int and abs(name) < 2**63:
        name = str(name)
    if type(name) is str:
        return f"{key}.{name}" if key else name
    if type(child) in (Tensor, Pairs, Bag, list, tuple):
        raise ValueError(f"{show(key)} has a key that is a {name_of(name)}")
    return key


# ---- writing ----
ROOT = "archive"
ALIGNMENT = 64  # as torch: aligned data can be used in place by any vector instruction
ZIP64_BYTES = 2**30
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def write_torch_file(path: str | Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a state_dict as torch.save would: loaded by torch.load(weights_only=True), with mmap=True as well. Needs no torch.

    One tensor at a time is made and written, each into its own storage. The file is incomplete after an error.

    Args:
      tensors: of the dtypes in `torch_pickle.DTYPES`.
    """
    with synced_file(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        write_entry(archive, "data.pkl", state_dict_pickle(tensors))
        write_entry(archive, "byteorder", b"little")
        for i, tensor in enumerate(tensors.values()):
            with open_entry(archive, f"data/{i}", tensor.nbytes) as entry:
                write_tensor(entry, tensor)
        write_entry(archive, "version", b"3\n")


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
    """The instruction GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def text_code(text: str) -> bytes:
    """The instruction BINUNICODE."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def int_code(value: int) -> bytes:
    """The instruction BININT, or LONG1 with 8 bytes."""
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
