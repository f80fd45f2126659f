"""Estimates the HBM bytes that a compiled program moves: the reads and writes of each scheduled instruction times its executions.

Inside fusions, an operand that is only sliced counts as its slice, and an update in place as the update. Values in on-chip memory are
free. Tile padding and repeated prefetches are not counted.
"""

from __future__ import annotations

import dataclasses
import re

from xomni_jax.core.cache import cached_method
from xomni_jax.planner.hlo import Array, Instruction, Module

FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "after-all", "partition-id",
    "opt-barrier", "copy-done", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done", "collective-permute-done", "async-done",
    "all-gather-done", "all-reduce-done",
}  # fmt: skip
SEE_THROUGH = ("bitcast", "reshape", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class Move:
    """What one scheduled instruction reads and writes per execution, and how often it runs."""

    instruction: Instruction
    computation: str
    read: int
    written: int
    times: int

    @property
    def total(self) -> int:
        """Bytes over all executions."""
        return (self.read + self.written) * self.times


def moves(module: Module) -> list[Move]:
    """Every scheduled instruction that touches HBM, in program order."""
    reader, out = _Reader(module), []
    for name in module.scheduled:
        made = {i.name: i for i in module.computations[name]}
        for i in module.computations[name]:
            if i.op in FREE or not module.times.get(name):
                continue
            read, written = reader.move(i, [made.get(o) for o in i.operands], module.trips.get(name))
            if read or written:
                out.append(Move(i, name, read, written, module.times[name]))
    return out


def copies(moved: list[Move], at_least: int) -> list[Move]:
    """Copies of at least `at_least` bytes within HBM, the sign of a buffer that is not updated in place or changes its layout."""
    return [m for m in moved if m.instruction.op in ("copy", "copy-start", "transpose") and m.read and m.written >= at_least]


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(a.bytes for a in arrays if a.in_hbm)


class _Reader:
    def __init__(self, module: Module):
        self.module = module

    def move(self, i: Instruction, operands: list[Instruction | None], trips: int | None) -> tuple[int, int]:
        """(bytes read, bytes written) by one execution."""
        results = [o.result if o else () for o in operands]
        if i.op in ("dynamic-update-slice", "scatter"):
            update = _hbm(results[-1] if i.op == "scatter" else results[1])
            return update, update
        if i.op in ("dynamic-slice", "slice", "gather"):
            size = sum(a.bytes for a in i.result)
            return (size if _hbm(results[0]) else 0), _hbm(i.result)
        if i.op.endswith("-start"):
            return self._start(i, results)
        if i.op == "fusion":
            callee = i.callees[0]
            # Types inside a fusion do not tell which memory an operand is in; the operand's own type does.
            read = sum(self._read(callee, n, arrays) for n, arrays in enumerate(results))
            return read, self._written(callee, i, self._aliased(i))
        if i.op == "custom-call":
            return self._custom(i, results, trips)
        return sum(map(_hbm, results)), _hbm(i.result)

    def _start(self, i: Instruction, results: list[tuple[Array, ...]]) -> tuple[int, int]:
        """The result of a "-start" holds the operands, then the destination and scalars."""
        given = sum(len(r) for r in results)
        made = i.result[given:] if len(i.result) > given else i.result
        moved = sum(a.bytes for a in made if a.shape)
        if i.op in ("slice-start", "dynamic-slice-start"):
            return (moved if _hbm(results[0]) else 0), _hbm(made)
        if i.op == "copy-start":
            made = i.result[:1]
            return _hbm(results[0]), _hbm(made)
        return sum(map(_hbm, results)), _hbm(tuple(a for a in made if a.shape))

    def _custom(self, i: Instruction, results: list[tuple[Array, ...]], trips: int | None) -> tuple[int, int]:
        if 'custom_call_target="tpu_custom_call"' not in i.rest and not results:
            return 0, 0  # an allocation

        def one_layer(a: Array) -> int:
            # A kernel that gets the weights of all layers and a layer's index reads that layer only.
            stacked = trips and len(a.shape) > 2 and a.shape[0] == trips
            return a.bytes // trips if stacked else a.bytes

        aliased = self._aliased(i)
        skipped = set(aliased.values())
        read = sum(one_layer(a) for n, arrays in enumerate(results) if n not in skipped for a in arrays if a.in_hbm)
        return read, sum(a.bytes for n, a in enumerate(i.result) if a.in_hbm and n not in aliased)

    def _aliased(self, i: Instruction) -> dict[int, int]:
        """{output number: operand number} of the outputs that alias operands."""
        found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.rest)
        pairs = re.findall(r"\{(\d*)\}: \((\d+)", found.group(1)) if found else []
        return {int(out or 0): int(operand) for out, operand in pairs}

    def _read(self, computation: str, number: int, arrays: tuple[Array, ...]) -> int:
        """Bytes a fused computation reads of its operand `number`."""
        if not _hbm(arrays):
            return 0
        part = self._part(computation, number)
        return _hbm(arrays) if part is None else min(part, _hbm(arrays))

    @cached_method
    def _part(self, computation: str, number: int) -> int | None:
        """Bytes read of an operand that is only sliced or updated in place; None where all of it is read."""
        lines = self.module.computations[computation]
        name = next((i.name for i in lines if i.op == "parameter" and i.number == number), None)
        return self._uses(lines, name) if name else 0

    def _uses(self, lines: list[Instruction], name: str) -> int | None:
        total = 0
        for i in lines:
            if name not in i.operands:
                continue
            if i.op in ("dynamic-slice", "slice", "gather") and i.operands[0] == name:
                total += i.bytes
            elif i.op in ("dynamic-update-slice", "scatter") and i.operands[0] == name and name not in i.operands[1:]:
                pass  # updated in place
            elif i.op in SEE_THROUGH:
                part = self._uses(lines, i.name)
                if part is None:
                    return None
                total += part
            elif i.op == "fusion" and self._copies(i.callees[0]):  # another order of the same values, read where they are used
                part = self._uses(lines, i.name)
                if part is None:
                    return None
                total += part
            elif i.op == "fusion":
                for n, operand in enumerate(i.operands):
                    if operand == name:
                        part = self._part(i.callees[0], n)
                        if part is None:
                            return None
                        total += part
            else:
                return None
        return total

    def _copies(self, computation: str) -> bool:
        """Whether a fusion within a fusion only copies its operand."""
        return [i.op for i in self.module.computations[computation]] == ["parameter", "copy"]

    def _written(self, computation: str, outer: Instruction, aliased: dict[int, int]) -> int:
        """Bytes a fusion writes: its results, or only the update where its root updates in place."""
        lines = {i.name: i for i in self.module.computations[computation]}
        root = next(i for i in lines.values() if i.root)
        parts = [lines.get(o) for o in root.operands] if root.op == "tuple" else [root]
        total = 0
        for n, array in enumerate(outer.result):
            if not array.in_hbm or n in aliased:
                continue
            update = self._update(lines, parts[n]) if n < len(parts) else None
            total += array.bytes if update is None else update
        return total

    def _update(self, lines: dict[str, Instruction], i: Instruction | None) -> int | None:
        """Bytes of the update where a value is the result of an update in place; None otherwise."""
        while i is not None and i.op in SEE_THROUGH:
            i = lines.get(i.operands[0])
        if i is None:
            return None
        if i.op == "parameter":
            return 0
        if i.op in ("dynamic-update-slice", "scatter"):
            update = lines.get(i.operands[1 if i.op == "dynamic-update-slice" else -1])
            return update.bytes if update else None
        if i.op == "fusion":
            inner = {x.name: x for x in self.module.computations[i.callees[0]]}
            return self._update(inner, next(x for x in inner.values() if x.root))
        return None
