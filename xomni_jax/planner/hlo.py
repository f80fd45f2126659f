"""Parses an optimised HLO module: its computations, and how often each runs.

The trip count of a loop is the constant that its condition compares the counter with; on a CPU the loop is annotated with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(ITEM_BYTES) + r")\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: element type, shape, and whether it is in HBM (rather than in on-chip or host memory)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        return int(ITEM_BYTES[self.dtype] * math.prod(self.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `rest` is everything after the operands; `number` is that of a scalar constant, or of a parameter."""

    name: str
    op: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool
    number: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole result."""
        return sum(a.bytes for a in self.result)

    @property
    def callees(self) -> list[str]:
        """Computations it calls once; not those of a loop."""
        branches = (name.strip().lstrip("%") for names in _BRANCHES.findall(self.rest) for name in names.split(","))
        return _CALLS.findall(self.rest) + list(branches)

    @property
    def loop(self) -> tuple[str, str] | None:
        """(condition, body) of a while loop."""
        return _LOOP.search(self.rest).groups() if self.op == "while" else None

    @property
    def source(self) -> str:
        """The operation of the traced program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass
class Module:
    """An optimised module of one device.

    Attributes:
      computations: name -> instructions, in order.
      entry: name of the computation that runs first.
      times: name -> executions per run of the program.
      trips: loop body -> iterations.
      unknown: loop bodies whose trip counts could not be read; they are counted once.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    times: dict[str, int]
    trips: dict[str, int]
    unknown: list[str]

    @functools.cached_property
    def scheduled(self) -> list[str]:
        """Computations whose instructions are scheduled one by one: the entry, loop bodies and branches, but not those inside fusions."""
        found, todo = [], [self.entry]
        while todo:
            name = todo.pop()
            if name in found:
                continue
            found.append(name)
            for i in self.computations[name]:
                if i.loop:
                    todo += i.loop
                elif i.op in ("call", "conditional"):
                    todo += i.callees
        return found

    @functools.cached_property
    def owners(self) -> dict[str, str]:
        """Computation -> the scheduled computation whose fusions contain it; a scheduled one -> itself."""
        owners: dict[str, str] = {}

        def visit(name: str, owner: str) -> None:
            if owners.setdefault(name, owner) == owner:
                for i in self.computations.get(name, ()):
                    if not i.loop and i.op not in ("call", "conditional"):
                        for callee in i.callees:
                            visit(callee, owner)

        for name in self.scheduled:
            visit(name, name)
        return owners

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of every instruction that runs."""
        for name, lines in self.computations.items():
            if self.times.get(name):
                for instruction in lines:
                    yield name, instruction


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, in order."""
    return tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(" not in layout) for dtype, sizes, layout in _ARRAY.findall(text)
    )


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head.group(2), [])
                entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == "}":  # not "starts with": the metadata of kernels has lines that begin with braces
            current = None
        elif (instruction := _instruction(line.strip())) is not None:
            current.append(instruction)
    module = Module(computations, entry, {}, {}, [])
    _count(module, entry, 1)
    return module


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, result, op = found.groups()
    end = _closing(line, found.end() - 1)
    inside = line[found.end() : end]
    number = int(inside) if op in ("constant", "parameter") and re.fullmatch(r"-?\d+", inside) else None
    return Instruction(name, op, arrays(result), tuple(re.findall(r"%([\w.\-]+)", inside)), line[end + 1 :], bool(root), number)


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if depth == 0:
            return at
    return len(line)


def _count(module: Module, name: str, times: int) -> None:
    module.times[name] = module.times.get(name, 0) + times
    for i in module.computations.get(name, ()):
        if i.loop:
            condition, body = i.loop
            known = _KNOWN_TRIPS.search(i.rest)
            trips = int(known.group(1)) if known else _trip_count(module.computations[condition])
            if trips is None:
                module.unknown.append(body)
            module.trips[body] = trips or 1
            _count(module, condition, times * (trips or 1))
            _count(module, body, times * (trips or 1))
        else:
            for callee in i.callees:
                _count(module, callee, times)


def _trip_count(condition: list[Instruction]) -> int | None:
    """Iterations of a loop whose counter starts at 0; None when its condition has another form."""
    constants = {i.name: i.number for i in condition if i.op == "constant"}
    root = next(i for i in condition if i.root)
    if root.op == "compare" and "direction=LT" in root.rest:
        return constants.get(root.operands[1])
    return None
