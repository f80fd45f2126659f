"""The names a PyTorch weights file may mention, and the inert stand-ins for what they would make. Anything not in `GLOBALS` is refused.

The functions get the machine that reads the pickle (`torch_pickle.Machine`) for its errors and its count of work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint.tensor_file import MAX_RANK

if TYPE_CHECKING:
    from xomni_jax.checkpoint.torch_pickle import Machine

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "ComplexFloatStorage": np.dtype(np.complex64),
}
PLAIN = (
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "complex128",
    "complex64",
)
EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES: dict[str, np.dtype] = (
    {name: np.dtype(name) for name in PLAIN}
    | {name: np.dtype(getattr(ml_dtypes, name)) for name in EXTENDED}
    | {"bool": np.dtype(np.bool_)}
)
UNTYPED = "torch.storage.UntypedStorage"


class Global(NamedTuple):
    """A listed name; `dtype` is set for storage types and dtypes, `build` for what may be called."""

    name: str
    dtype: np.dtype | None = None
    build: Callable[[Machine, tuple], Any] | None = None


class Storage(NamedTuple):
    """An entry of the archive, `data/<key>`, of `nbytes` bytes, read as `dtype` where the tensor does not say otherwise."""

    key: str
    dtype: np.dtype
    nbytes: int


class Tensor(NamedTuple):
    """A view into a storage; `offset` and `strides` in elements. Its bounds have been checked against the storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Table(list):
    """Stand-in of a dict or an OrderedDict: key, value, key, value, ... Nothing of the file is ever hashed or compared."""


class Bag(list):
    """Stand-in of a set: its items in the file's order."""


def name_of(value: Any) -> str:
    """What an object is called in errors; never its contents, which may be long or deep."""
    if type(value) is Global:
        return value.name
    return {Table: "dict", Bag: "set"}.get(type(value), type(value).__name__)


def ordered_dict(machine: Machine, args: tuple) -> Table:
    """OrderedDict() or, as Python 2 wrote it, OrderedDict([[key, value], ...])."""
    if not args:
        return Table()
    if len(args) != 1 or type(args[0]) is not list or not all(type(p) in (list, tuple) and len(p) == 2 for p in args[0]):
        raise machine.damaged("makes an OrderedDict of something that is no list of pairs")
    machine.spend(len(args[0]))  # a remembered list may be copied again and again
    return Table(x for pair in args[0] for x in pair)


def make_set(machine: Machine, args: tuple) -> Bag:
    """set([item, ...])."""
    if len(args) != 1 or type(args[0]) is not list:
        raise machine.damaged("makes a set of something that is no list")
    machine.spend(len(args[0]))
    return Bag(args[0])


def size(machine: Machine, args: tuple) -> tuple:
    """torch.Size((n, ...))."""
    if len(args) != 1 or type(args[0]) is not tuple:
        raise machine.damaged("makes a torch.Size of something that is no tuple")
    return args[0]


def device(machine: Machine, args: tuple) -> None:
    """torch.device(...): where a tensor once was does not matter."""


def parameter(machine: Machine, args: tuple) -> Tensor:
    """_rebuild_parameter(tensor, requires_grad, hooks)."""
    if len(args) != 3 or type(args[0]) is not Tensor:
        raise machine.damaged("makes a parameter of something that is no tensor")
    return args[0]


def tensor_v2(machine: Machine, args: tuple) -> Tensor:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    if not 6 <= len(args) <= 7:
        raise machine.damaged(f"makes a tensor of {len(args)} things, 6 or 7 are needed")
    return tensor(machine, args[:4], None, args[6:])


def tensor_v3(machine: Machine, args: tuple) -> Tensor:
    """_rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])."""
    if not 7 <= len(args) <= 8:
        raise machine.damaged(f"makes a tensor of {len(args)} things, 7 or 8 are needed")
    if type(args[6]) is not Global or args[6].dtype is None or is_storage(args[6]):
        raise machine.damaged("makes a tensor of a dtype that is none")
    return tensor(machine, args[:4], args[6].dtype, args[7:])


def tensor(machine: Machine, args: tuple, dtype: np.dtype | None, metadata: tuple) -> Tensor:
    """A view of a storage, checked to lie within it."""
    storage, offset, shape, strides = args
    if type(storage) is not Storage or not is_size(offset):
        raise machine.damaged("makes a tensor without a storage or offset")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_RANK:
        raise machine.damaged(f"makes a tensor whose shape and strides are not two tuples of at most {MAX_RANK} sizes")
    if not all(is_size(n) for n in shape + strides):
        raise machine.damaged("makes a tensor of a size or stride that is none")
    if metadata and type(metadata[0]) is Table and any(v is not False for v in metadata[0][1::2]):
        raise machine.refuse("a tensor with metadata, such as a conjugated view")
    dtype = storage.dtype if dtype is None else dtype
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise machine.damaged(f"makes a tensor {dtype.name}{list(shape)} that reaches beyond its storage of {storage.nbytes} bytes")
    return Tensor(storage, dtype, offset, shape, strides)


def is_size(value: Any) -> bool:
    """An offset, size or stride."""
    return type(value) is int and 0 <= value < 2**60


def is_storage(value: Global) -> bool:
    """A storage type, as opposed to a dtype or a function."""
    return value.name.endswith("Storage")


GLOBALS: dict[str, Global] = {
    "collections.OrderedDict": Global("collections.OrderedDict", build=ordered_dict),
    "builtins.set": Global("builtins.set", build=make_set),
    "__builtin__.set": Global("builtins.set", build=make_set),  # protocol 2 uses Python 2's name
    "torch.Size": Global("torch.Size", build=size),
    "torch.device": Global("torch.device", build=device),
    "torch._utils._rebuild_parameter": Global("torch._utils._rebuild_parameter", build=parameter),
    "torch._utils._rebuild_tensor_v2": Global("torch._utils._rebuild_tensor_v2", build=tensor_v2),
    "torch._utils._rebuild_tensor_v3": Global("torch._utils._rebuild_tensor_v3", build=tensor_v3),
    "torch.UntypedStorage": Global(UNTYPED, np.dtype(np.uint8)),
    UNTYPED: Global(UNTYPED, np.dtype(np.uint8)),
} | {f"torch.{name}": Global(f"torch.{name}", dtype) for name, dtype in (STORAGES | DTYPES).items()}
