"""The pickle in a PyTorch file, read by the standard library's unpickler, which finds nothing to call but the stand-ins below.

Three measures make that safe for a file of unknown origin:

- `find_class` knows only the names in `GLOBALS`, as inert `Global`s, and one class without attributes. Every other name is refused, so no
  code of the file's choice runs.
- `sanitised` reads the instructions first. It refuses those that weights do not need, and bounds their number and the memo indices, for
  which the unpickler would allocate any amount of memory.
- It also replaces dicts and sets by stand-ins that are lists, since to hash a key from the file may take exponential time or overflow the
  C stack.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint.tensor_file import MAX_RANK, TensorFileError, reason, show

# An instruction allocates less than 256 bytes on average, so this keeps the objects below 64 MB + the file's size.
FREE_INSTRUCTIONS = 250_000
BYTES_PER_INSTRUCTION = 256
INSTRUCTIONS = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID
    """.split()
)
# FRAME is a hint for buffering, and would be wrong after the replacements.
REPLACED = {"FRAME": b"", "EMPTY_DICT": b"ccollections\nOrderedDict\n)R", "EMPTY_SET": b"cbuiltins\nset\n)R"}

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
PLAIN = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 complex128 complex64".split()
EXTENDED = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
DTYPES = {name: np.dtype(name) for name in PLAIN} | {name: np.dtype(getattr(ml_dtypes, name)) for name in EXTENDED}
DTYPES["bool"] = np.dtype(np.bool_)
BUILTINS = ("builtins", "__builtin__")  # protocol 2 uses Python 2's name
UNTYPED = "torch.storage.UntypedStorage"


class Refused(ValueError):
    """The pickle asks for something that weights do not need."""


def unpickle(data: bytes, where: str, limit: int) -> Any:
    """The object that a pickle describes, made of stand-ins, plain values, lists and tuples.

    Args:
      data: the pickle.
      where: names it in errors.
      limit: the most instructions it may have.

    Raises:
      TensorFileError: damaged, too long, or it asks for anything but weights; nothing of it has been run.
    """
    try:
        return WeightsUnpickler(io.BytesIO(sanitised(data, limit)), encoding="utf-8").load()
    except Refused as e:
        raise TensorFileError(
            f"{where} asks for {e}, which weights do not need; nothing of it was run, get the weights as safetensors"
        ) from None
    except Exception as e:  # noqa: BLE001 - pickletools and pickle raise a dozen kinds for damaged bytes
        raise TensorFileError(f"{where} cannot be read ({reason(e)}); the file is damaged, download it again") from None


def instruction_limit(file_bytes: int) -> int:
    """The most instructions that the pickle of a file of this size may have. Real ones have about 40 for each tensor."""
    return FREE_INSTRUCTIONS + file_bytes // BYTES_PER_INSTRUCTION


def sanitised(data: bytes, limit: int) -> bytes:
    """The same pickle without instructions that could harm; see the module's docstring."""
    out, names, stream = bytearray(), [], io.BytesIO(data)
    for count, (op, arg, start) in enumerate(pickletools.genops(stream)):
        if count >= limit:
            raise Refused(f"more than {limit:,} instructions")
        if op.name in ("GLOBAL", "INST"):
            names.append(arg)
        if op.name not in INSTRUCTIONS:
            for name in names:
                find(*name.split(" ", 1))  # a refused name tells more than the instruction that comes with it
            raise Refused(f"the pickle instruction {op.name}")
        if op.name in ("BINPUT", "LONG_BINPUT") and arg > count:
            raise ValueError(f"memo index {arg} after {count} instructions")
        if isinstance(arg, str):
            arg.encode()  # refuses half a surrogate pair, which pickle lets pass
        out += REPLACED.get(op.name, data[start : stream.tell()])
    return bytes(out)


def find(module: str, name: str) -> Global | type[Namespace]:
    """A listed name; any other is refused."""
    full = f"{module}.{name}"
    if full not in GLOBALS:
        raise Refused(show(full))
    return GLOBALS[full]


class WeightsUnpickler(pickle.Unpickler):
    """Finds the names in `GLOBALS`, and torch's storages."""

    def find_class(self, module: str, name: str) -> Global | type[Namespace]:
        return find(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        """The only persistent id that torch writes: ("storage", type, key, device, number of elements)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise Refused("an outside object that is no storage")
        _, kind, key, _, count = pid
        if type(kind) is not Global or not kind.name.endswith("Storage"):
            raise Refused(f"a storage of type {name_of(kind)}")
        if type(key) is not str or not is_size(count):
            raise ValueError("a storage without a name or size")
        return Storage(key, kind.dtype, count * kind.dtype.itemsize)


# ---- stand-ins: tuples and slots, so that the instruction BUILD finds no attribute to set ----
class Global(NamedTuple):
    """A listed name; `dtype` is set for storage types and dtypes, `build` for what may be called."""

    name: str
    dtype: np.dtype | None = None
    build: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.build is None:
            raise Refused(f"a call of {self.name}")
        return self.build(*args)


class Storage(NamedTuple):
    """An entry of the archive, `data/<key>`, of `nbytes` bytes, read as `dtype` where the tensor does not say otherwise."""

    key: str
    dtype: np.dtype
    nbytes: int


class Tensor(NamedTuple):
    """A view into a storage; `offset` and `strides` in elements. It lies within the storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pairs:
    """A dict or an OrderedDict: `items` holds (key, value)."""

    __slots__ = ("items",)

    def __init__(self, items: Any = None):
        self.items = [] if items is None else items  # not copied or checked, which a file could ask for without end

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __setstate__(self, state: Any) -> None:
        """torch sets `_metadata` of a state_dict."""


class Bag:
    """A set: `items` in the file's order."""

    __slots__ = ("items",)

    def __init__(self, items: Any = None):
        self.items = [] if items is None else items

    def add(self, item: Any) -> None:
        """What the unpickler calls."""
        self.items.append(item)


class Namespace:
    """An argparse.Namespace, in which Lightning keeps the options of a run: empty."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """The options, which are dropped."""


def name_of(value: Any) -> str:
    """What an object is called in errors; never its contents, which may be long or deep."""
    return value.name if type(value) is Global else {Pairs: "dict", Bag: "set"}.get(type(value), type(value).__name__)


def rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None, *, dtype: Any = None
) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage, checked to lie within it."""
    if type(storage) is not Storage or not is_size(offset):
        raise ValueError("a tensor without a storage or offset")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_RANK:
        raise ValueError("a tensor whose shape and strides are not two tuples of at most 32 sizes")
    if not all(map(is_size, shape + strides)):
        raise ValueError("a tensor of a size or stride that is none")
    if metadata is not None and not (type(metadata) is Pairs and not metadata.items):
        raise Refused("a tensor with metadata, such as a conjugated view")
    dtype = storage.dtype if dtype is None else dtype
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor {dtype.name}{list(shape)} that reaches beyond its storage of {storage.nbytes} bytes")
    return Tensor(storage, dtype, offset, shape, strides)


def rebuild_tensor_v3(*args: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`, of dtypes that have no storage type: its seventh argument is the dtype."""
    *first, dtype = args[:7]
    if type(dtype) is not Global or dtype.dtype is None or dtype.name.endswith("Storage"):
        raise ValueError("a tensor of a dtype that is none")
    return rebuild_tensor(*first, *args[7:], dtype=dtype.dtype)


def is_size(value: Any) -> bool:
    """An offset, size or stride."""
    return type(value) is int and 0 <= value < 2**60


# What `torch.load(weights_only=True)` calls, too. What is no tensor comes to nothing: the callers only name it.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Pairs,
    "collections.Counter": lambda *counts: None,
    "_codecs.encode": lambda *text: None,  # bytes, in protocol 2
    **{f"{module}.set": Bag for module in BUILTINS},
    **{f"{module}.{name}": lambda *value: None for module in BUILTINS for name in ("bytearray", "complex")},
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *place: None,
    "torch.serialization._get_layout": lambda *name: None,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, requires_grad, hooks, state: tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
}
GLOBALS = (
    {name: Global(name, build=build) for name, build in FUNCTIONS.items()}
    | {f"torch.{name}": Global(f"torch.{name}", dtype) for name, dtype in (STORAGES | DTYPES).items()}
    | {name: Global(UNTYPED, np.dtype(np.uint8)) for name in (UNTYPED, "torch.UntypedStorage")}
    | {"argparse.Namespace": Namespace}
)
