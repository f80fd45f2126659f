"""Pickles and torch archives put together by hand: what torch writes, and what it never would."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from xomni_jax.checkpoint.tensor_file import TensorFileError
from xomni_jax.checkpoint.torch_file import TorchFile


class Raw(bytes):
    """Pickle code that leaves one object on the stack."""


def code(value) -> Raw:
    """Protocol 2 code of a value; Raw parts may stand anywhere inside it."""
    if isinstance(value, Raw):
        return value
    if value is None or isinstance(value, bool):
        return Raw({None: b"N", True: b"\x88", False: b"\x89"}[value])
    if isinstance(value, int):
        return Raw(
            b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
        )
    if isinstance(value, float):
        return Raw(b"G" + struct.pack(">d", value))
    if isinstance(value, str):
        return Raw(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
    if isinstance(value, dict):
        return Raw(b"}(" + b"".join(code(x) for pair in value.items() for x in pair) + b"u")
    inside = b"".join(map(code, value))
    return Raw({tuple: b"(" + inside + b"t", list: b"](" + inside + b"e", set: b"\x8f(" + inside + b"\x90"}[type(value)])


def name(full: str) -> Raw:
    """GLOBAL."""
    module, _, attribute = full.rpartition(".")
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(full: str, *args) -> Raw:
    """GLOBAL and REDUCE."""
    return Raw(name(full) + code(args) + b"R")


def storage(key="0", kind="torch.FloatStorage", count=12, device="cpu") -> Raw:
    """A storage as torch names it."""
    return Raw(code(("storage", name(kind), key, device, count)) + b"Q")


def tensor(shape, strides, offset=0, of=None, dtype=None, more=()) -> Raw:
    """_rebuild_tensor_v2, or v3 when `dtype` is given."""
    args = (of or storage(), offset, shape, strides, False, call("collections.OrderedDict"))
    return (
        call("torch._utils._rebuild_tensor_v2", *args, *more)
        if dtype is None
        else call("torch._utils._rebuild_tensor_v3", *args, name(dtype), *more)
    )


def program(value) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + code(value) + b"."


FLOATS = np.arange(12, dtype=np.float32)


def archive(pickle: bytes, storages=None, root="archive", order=b"little", more=None, method=zipfile.ZIP_STORED) -> bytes:
    """A torch zip file; its only storage is `FLOATS` unless others are given."""
    entries = {"data.pkl": pickle, "byteorder": order, "version": b"3\n"} | (more or {})
    entries |= {f"data/{k}": v for k, v in ({"0": FLOATS.tobytes()} if storages is None else storages).items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for entry, data in entries.items():
            if data is not None:
                file.writestr(zipfile.ZipInfo(f"{root}/{entry}"), data, method)
    return out.getvalue()


HERE = Path("weights.pth")
W = tensor((3, 4), (4, 1))


def two_storages() -> dict:
    """Two tensors, of typed and of plain bytes, and what is none."""
    return {"a": W, "b": {"c": [tensor((2,), (3,), 1, storage("1", "torch.UntypedStorage", 16), "torch.float16"), 3, "x", None]}}


def refused(data: bytes, words: str) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(TensorFileError, match=words) as error:
        TorchFile(HERE, data)
    text = str(error.value)
    assert text.startswith("weights.pth: ") and "\n" not in text and len(text) < 500, text
    return text
