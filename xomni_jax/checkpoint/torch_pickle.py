"""An interpreter for the few pickle instructions that a file of weights needs. It runs no code but its own.

Python's `pickle` is a small machine whose instructions can call any function of any module. This one has no import, no call and no
attribute access: a name is looked up in `torch_names.GLOBALS` and becomes an inert stand-in, "calling" one of them runs our few lines
there, and everything else is refused by its full name. Every instruction is counted, and none does work that its count does not bound.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

from xomni_jax.checkpoint.tensor_file import TensorFileError, show
from xomni_jax.checkpoint.torch_names import GLOBALS, Bag, Global, Storage, Table, is_size, is_storage, name_of

# An instruction allocates less than 256 bytes on average, so this keeps the objects below 64 MB + the file's size.
FREE_INSTRUCTIONS = 250_000
BYTES_PER_INSTRUCTION = 256
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


def unpickle(data: bytes, where: str, file_bytes: int) -> Any:
    """The object that a pickle describes, made of stand-ins, plain values, lists and tuples.

    Args:
      data: the pickle.
      where: names it in errors.
      file_bytes: size of the file it comes from, which bounds the number of instructions.

    Raises:
      TensorFileError: damaged, too long for its file, or it asks for anything but weights; nothing of it has been run.
    """
    return Machine(data, where, instruction_limit(file_bytes)).run()


def instruction_limit(file_bytes: int) -> int:
    """The most instructions that the pickle of a file of this size may have. Real ones have about 40 for each tensor."""
    return FREE_INSTRUCTIONS + file_bytes // BYTES_PER_INSTRUCTION


class Machine:
    """The stack machine.

    Args:
      data: the pickle.
      where: names it in errors.
      limit: the most instructions it may have.
    """

    def __init__(self, data: bytes, where: str, limit: int):
        self.data, self.where, self.left, self.at = data, where, limit, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Executes until STOP."""
        while (code := self.take(1)[0]) != ord("."):
            self.spend(1)
            if code not in HANDLERS:
                raise (
                    self.refuse(f"the pickle instruction {OPCODES[code]}")
                    if code in OPCODES
                    else self.damaged(f"has no instruction {code}")
                )
            HANDLERS[code](self)
        if len(self.stack) != 1 or self.below:
            raise self.damaged("does not end with one object")
        return self.stack[0]

    # ---- errors and bounds ----
    def damaged(self, what: str) -> TensorFileError:
        """An error of form."""
        return TensorFileError(f"{self.where} {what} (before byte {self.at}); the file is damaged, download it again")

    def refuse(self, what: str) -> TensorFileError:
        """An error of content."""
        return TensorFileError(
            f"{self.where} asks for {what}, which weights do not need; nothing of it was run, get the weights as safetensors"
        )

    def spend(self, count: int) -> None:
        """Counts instructions, or work that is worth as many."""
        self.left -= count
        if self.left < 0:
            raise TensorFileError(f"{self.where} is too long for the file it is in; get the weights as safetensors")

    # ---- input ----
    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        end = self.at + count
        if end > len(self.data):
            raise self.damaged("is cut off")
        out, self.at = self.data[self.at : end], end
        return out

    def number(self, form: str) -> Any:
        """The next bytes as one number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def integer(self, count: int) -> int:
        """An integer of up to 255 bytes: weights have no use for longer ones, and they are slow to print."""
        if not 0 <= count <= 255:
            raise self.refuse(f"an integer of {count} bytes")
        return int.from_bytes(self.take(count), "little", signed=True)

    def text(self, count: int) -> str:
        """UTF-8 without the half surrogates that pickle would let pass."""
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise self.damaged("holds text that is not UTF-8") from None

    def line(self) -> str:
        """Text up to the next line feed."""
        end = self.data.find(b"\n", self.at)
        text = self.text((end if end >= 0 else len(self.data)) - self.at)
        self.take(1)
        return text

    # ---- stack and memo ----
    def push(self, value: Any) -> None:
        """Puts an object on the stack."""
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """Takes the topmost `count` objects off, lowest first."""
        start = len(self.stack) - count
        if start < 0:
            raise self.damaged("takes more from its stack than is there")
        out = self.stack[start:]
        del self.stack[start:]
        return out

    def mark(self) -> None:
        """Starts a new stack on top of the present one."""
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Takes everything above the last MARK off."""
        if not self.below:
            raise self.damaged("lacks a MARK")
        out, self.stack = self.stack, self.below.pop()
        return out

    def drop(self) -> None:
        """POP: an object, or the last MARK if nothing is above it."""
        self.pop(1) if self.stack else self.pop_mark()

    def peek(self) -> Any:
        """The topmost object."""
        if not self.stack:
            raise self.damaged("takes more from its stack than is there")
        return self.stack[-1]

    def put(self, index: int) -> None:
        """Remembers the topmost object."""
        self.memo[index] = self.peek()

    def get(self, index: int) -> None:
        """Pushes a remembered object."""
        if index not in self.memo:
            raise self.damaged(f"recalls object {index}, which it did not remember")
        self.push(self.memo[index])

    # ---- containers ----
    def extend(self, items: list[Any], kind: type) -> None:
        """Adds items to the container on top."""
        container = self.peek()
        if type(container) is not kind:  # in real pickle: any object with append, __setitem__ or add
            raise self.refuse(f"adding items to a {name_of(container)}")
        container.extend(self.pairs(items) if kind is Table else items)

    def pairs(self, items: list[Any]) -> list[Any]:
        """Items that must be keys and values by turns."""
        if len(items) % 2:
            raise self.damaged("sets a key without a value")
        return items

    # ---- names, calls, outside objects ----
    def find(self, module: Any, name: Any) -> Global:
        """A listed name; any other is refused."""
        if type(module) is not str or type(name) is not str:
            raise self.damaged("names a global by something that is no text")
        if f"{module}.{name}" not in GLOBALS:
            raise self.refuse(show(f"{module}.{name}"))
        return GLOBALS[f"{module}.{name}"]

    def call(self, function: Any, args: Any) -> None:
        """REDUCE and NEWOBJ: pushes the stand-in of what the listed function would have made."""
        if type(function) is not Global or function.build is None:
            raise self.refuse(f"a call of {name_of(function)}")
        if type(args) is not tuple:
            raise self.damaged(f"calls {function.name} without a tuple of arguments")
        self.push(function.build(self, args))

    def inst(self) -> None:
        """INST, a call of protocol 0."""
        raise self.refuse(f"an instance of {self.find(self.line(), self.line()).name} by INST")

    def obj(self) -> None:
        """OBJ, a call of protocol 1."""
        raise self.refuse(f"an instance of {name_of((self.pop_mark() or [None])[0])} by OBJ")

    def newobj_ex(self) -> None:
        """NEWOBJ_EX, a call with keywords."""
        raise self.refuse(f"a call of {name_of(self.pop(3)[0])} with keywords")

    def build(self) -> None:
        """State for an object. An OrderedDict may have one (torch's `_metadata`), which is left out."""
        self.pop(1)
        if type(self.peek()) is not Table:
            raise self.refuse(f"setting the state of a {name_of(self.peek())}")

    def extension(self, form: str) -> None:
        """EXT1, EXT2, EXT4: a call by number."""
        raise self.refuse(f"the copyreg extension {self.number(form)}")

    def persid(self) -> None:
        """PERSID, an outside object of protocol 0."""
        raise self.refuse(f"the outside object {show(self.line())}")

    def binpersid(self) -> None:
        """("storage", type, key, device, number of elements), the only outside object that torch writes."""
        (pid,) = self.pop(1)
        if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str or pid[0] != "storage":
            first = pid[0] if type(pid) is tuple and pid else pid
            raise self.refuse(f"the outside object {show(first) if type(first) is str else name_of(first)}")
        _, kind, key, _, count = pid
        if type(kind) is not Global or not is_storage(kind):
            raise self.refuse(f"a storage of type {name_of(kind)}")
        if type(key) is not str or not is_size(count):
            raise self.damaged("describes a storage without a name or size")
        self.push(Storage(key, kind.dtype, count * kind.dtype.itemsize))


Handler = Callable[[Machine], Any]
BY_NAME: dict[str, Handler] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),  # a hint for buffering
    "MARK": Machine.mark,
    "POP": Machine.drop,
    "POP_MARK": Machine.pop_mark,
    "DUP": lambda m: m.push(m.peek()),
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "BININT": lambda m: m.push(m.number("<i")),
    "BININT1": lambda m: m.push(m.number("<B")),
    "BININT2": lambda m: m.push(m.number("<H")),
    "LONG1": lambda m: m.push(m.integer(m.number("<B"))),
    "LONG4": lambda m: m.push(m.integer(m.number("<i"))),
    "BINFLOAT": lambda m: m.push(m.number(">d")),
    "SHORT_BINUNICODE": lambda m: m.push(m.text(m.number("<B"))),
    "BINUNICODE": lambda m: m.push(m.text(m.number("<I"))),
    "BINUNICODE8": lambda m: m.push(m.text(m.number("<Q"))),
    "SHORT_BINSTRING": lambda m: m.push(m.text(m.number("<B"))),
    "BINSTRING": lambda m: m.push(m.text(m.number("<I"))),
    "SHORT_BINBYTES": lambda m: m.push(m.take(m.number("<B"))),
    "BINBYTES": lambda m: m.push(m.take(m.number("<I"))),
    "BINBYTES8": lambda m: m.push(m.take(m.number("<Q"))),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE1": lambda m: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m: m.push(tuple(m.pop(3))),
    "TUPLE": lambda m: m.push(tuple(m.pop_mark())),
    "EMPTY_LIST": lambda m: m.push([]),
    "LIST": lambda m: m.push(m.pop_mark()),
    "APPEND": lambda m: m.extend(m.pop(1), list),
    "APPENDS": lambda m: m.extend(m.pop_mark(), list),
    "EMPTY_DICT": lambda m: m.push(Table()),
    "DICT": lambda m: m.push(Table(m.pairs(m.pop_mark()))),
    "SETITEM": lambda m: m.extend(m.pop(2), Table),
    "SETITEMS": lambda m: m.extend(m.pop_mark(), Table),
    "EMPTY_SET": lambda m: m.push(Bag()),
    "ADDITEMS": lambda m: m.extend(m.pop_mark(), Bag),
    "BINPUT": lambda m: m.put(m.number("<B")),
    "LONG_BINPUT": lambda m: m.put(m.number("<I")),
    "MEMOIZE": lambda m: m.put(len(m.memo)),
    "BINGET": lambda m: m.get(m.number("<B")),
    "LONG_BINGET": lambda m: m.get(m.number("<I")),
    "GLOBAL": lambda m: m.push(m.find(m.line(), m.line())),
    "STACK_GLOBAL": lambda m: m.push(m.find(*m.pop(2))),
    "REDUCE": lambda m: m.call(*m.pop(2)),
    "NEWOBJ": lambda m: m.call(*m.pop(2)),
    "NEWOBJ_EX": Machine.newobj_ex,
    "INST": Machine.inst,
    "OBJ": Machine.obj,
    "BUILD": Machine.build,
    "EXT1": lambda m: m.extension("<B"),
    "EXT2": lambda m: m.extension("<H"),
    "EXT4": lambda m: m.extension("<i"),
    "PERSID": Machine.persid,
    "BINPERSID": Machine.binpersid,
}
HANDLERS: dict[int, Handler] = {code: BY_NAME[name] for code, name in OPCODES.items() if name in BY_NAME}
