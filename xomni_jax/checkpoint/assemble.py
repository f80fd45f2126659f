"""Parameters put together from a checkpoint's tensors, any part of one at a time: nothing larger than what is asked for is held."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint.conversion import Make, Rule, Table

FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16))
TILE = (16, 4096)  # elements of a strided copy that stay in the caches: eight times the speed of a plain transposed assignment
Index = tuple[slice, ...]


class Sources:
    """Tensors of several files under one set of names; a file's keys may get a prefix.

    Attributes:
      infos: {name: TensorInfo}; `info.file` and `info.key` are those of the file.
      places: {prefix: file or folder}, for what is missing.
    """

    def __init__(self) -> None:
        self.infos: dict[str, Any] = {}
        self.places: dict[str, Path] = {}
        self._files: dict[str, tuple[Any, str]] = {}

    def add(self, file: Any, prefix: str = "", known: str = "") -> Sources:
        """All tensors of one `TensorFile`.

        Args:
          known: a key that it must hold; what a wrapper such as {"state_dict": ...} put before it is cut from all keys.
        """
        self.places[prefix] = file.path
        wrapper = next((key.removesuffix(known) for key in file.infos if known and (key == known or key.endswith("." + known))), "")
        for key, info in file.infos.items():
            name = prefix + key.removeprefix(wrapper)
            self.infos[name], self._files[name] = info, (file, key)
        return self

    def alias(self, name: str, of: str) -> None:
        """A second name of the same tensor (tied weights)."""
        self.infos[name], self._files[name] = self.infos[of], self._files[of]

    def read(self, name: str) -> np.ndarray:
        """The tensor, a view of the memory map."""
        file, key = self._files[name]
        return file.read(key)

    def release(self, name: str) -> None:
        """Gives back the memory that reading it filled."""
        file, key = self._files[name]
        file.release(key)

    def found(self, name: str) -> str:
        """What a message calls a tensor that is there."""
        return f"{self.infos[name].file}: {self.infos[name].key}"

    def absent(self, name: str) -> str:
        """What a message calls a tensor that should be there."""
        prefix = max((p for p in self.places if name.startswith(p)), key=len, default="")
        return f"{self.places.get(prefix, '')}: {name.removeprefix(prefix)}"


@dataclass
class Target:
    """One parameter: where its values come from, and any rectangle of it on demand.

    Attributes:
      path, shape, dtype: of the parameter.
      rules: what fills it, or none, then `make` draws it from `seed`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sources: Sources
    rules: list[Rule] = field(default_factory=list)
    make: Make | None = None
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stacked(self) -> bool:
        """Whether the first axis is the layers'."""
        return self.make.stacked if self.make else self.rules[0].layer is not None

    @property
    def order(self) -> tuple[int, ...]:
        """Axes from the slowest to the fastest in the source file; reading blocks along the first one reads the file in order."""
        if self.make:
            return tuple(range(len(self.shape)))
        rule = self.rules[0]
        view = rule.fit.to_jax(np.broadcast_to(np.int8(0), self.sources.infos[rule.source].shape))
        strides = rule.fit.to_jax(_strides_of(self.sources.infos[rule.source].shape)).strides if view.size else view.strides
        free = [axis for axis, at in enumerate(rule.place(len(self.shape))) if isinstance(at, slice)]
        fixed = [axis for axis in range(len(self.shape)) if axis not in free]
        return (*fixed, *sorted(free, key=lambda axis: -strides[free.index(axis)]))

    def read(self, index: Index | None = None) -> np.ndarray:
        """The rectangle `index` (all of it without one), C-ordered, in the parameter's dtype."""
        spans = [range(*s.indices(n)) for s, n in zip(index or (slice(None),) * len(self.shape), self.shape, strict=True)]
        out = np.empty(tuple(map(len, spans)), self.dtype)
        if self.make:
            self._draw(spans, out)
        for rule in self.rules:
            value, out_at = self.rule_view(rule, spans)
            if value is not None and value.size:
                copy_strided(out[out_at], value)
        return out

    def rule_view(self, rule: Rule, spans: list[range]) -> tuple[np.ndarray | None, tuple[int | slice, ...]]:
        """(the part of the rule's tensor that lies in the rectangle, where it goes there); (None, ()) if none does."""
        value_at: list[slice] = []
        out_at: list[int | slice] = []
        for at, span in zip(rule.place(len(self.shape)), spans):
            if isinstance(at, slice):
                value_at.append(slice(span.start, span.stop))
                out_at.append(slice(None))
            elif at in span:
                out_at.append(at - span.start)
            else:
                return None, ()
        return rule.fit.to_jax(self.sources.read(rule.source))[tuple(value_at)], tuple(out_at)

    def release(self) -> None:
        """Gives back the memory of all sources."""
        for rule in self.rules:
            self.sources.release(rule.source)

    def _draw(self, spans: list[range], out: np.ndarray) -> None:
        # A layer is drawn whole, from a seed of its own: what a host or device draws does not depend on how the array is split.
        at = tuple(slice(s.start, s.stop) for s in spans)
        layers = spans[0] if self.stacked else [None]
        for layer in layers:
            rng = np.random.default_rng([self.seed, zlib.crc32(self.path.encode()), 0 if layer is None else layer + 1])
            values = self.make.draw(rng, self.shape if layer is None else self.shape[1:])
            if layer is None:
                out[...] = values[at]
            else:
                out[layer - spans[0].start] = values[at[1:]]


def _strides_of(shape: tuple[int, ...]) -> np.ndarray:
    """An array that has the strides of a C-ordered one of this shape, over no memory: never read it."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, tuple(reversed(strides)), writeable=False)


def copy_strided(out: np.ndarray, value: np.ndarray) -> None:
    """out[...] = value, cast to out's dtype; by tiles where the two lie in memory in different orders."""
    if value.ndim < 2 or value.flags.c_contiguous or value.strides[-1] == value.itemsize:
        out[...] = value
        return
    if value.ndim > 2:
        two = _as_matrix(value)
        if two is None or not out.flags.c_contiguous:
            for i in range(len(value)):
                copy_strided(out[i], value[i])
            return
        value, out = two, out.reshape(two.shape)
    rows, columns = TILE if value.strides[0] < value.strides[1] else TILE[::-1]
    for i in range(0, value.shape[1], rows):
        for j in range(0, value.shape[0], columns):
            out[j : j + columns, i : i + rows] = value[j : j + columns, i : i + rows]


def _as_matrix(value: np.ndarray) -> np.ndarray | None:
    """The same memory with two axes, if the axes fold so; None otherwise."""
    for split in range(1, value.ndim):
        shape = math.prod(value.shape[:split]), math.prod(value.shape[split:])
        try:
            return value.reshape(shape, copy=False)
        except ValueError:
            continue
    return None


def targets_of(
    table: Table, wanted: Mapping[str, tuple[int, ...]], sources: Sources, dtype: np.dtype | None, seed: int = 0
) -> tuple[list[Target], list[str]]:
    """The parameters of one component in their order, and what is wrong with the dtypes.

    Args:
      table: checked by `conversion.problems`.
      dtype: of every parameter; None keeps the stored ones (new parameters take the one that most bytes have).
    """
    rules: dict[str, list[Rule]] = {}
    for rule in table.rules:
        rules.setdefault(rule.target, []).append(rule)
    makes, out, wrong = {make.target: make for make in table.makes}, [], []
    usual = usual_dtype(sources, table)
    for path, shape in wanted.items():
        mine = rules.get(path, [])
        kinds = {rule.source: np.dtype(sources.infos[rule.source].dtype) for rule in mine}
        quantised = "whole numbers or 8-bit floats are quantised weights; give the unquantised checkpoint"
        wrong += [f"{sources.found(key)}: {kind.name}, {quantised}" for key, kind in kinds.items() if not _is_float(kind)]
        first = next(iter(kinds.values()), usual)
        if dtype is None:
            odd = next((key for key, kind in kinds.items() if kind != first), None)
            if odd:
                wrong.append(
                    f"{sources.found(odd)}: {kinds[odd].name}, but {first.name} in other layers of {path}; choose one with --dtype"
                )
            elif _is_float(first) and first not in FLOATS:
                wrong.append(f"{sources.found(next(iter(kinds)))}: {first.name} is not kept; choose --dtype float32 or bfloat16")
        out.append(Target(path, tuple(shape), first if dtype is None else np.dtype(dtype), sources, mine, makes.get(path), seed))
    return out, wrong


def usual_dtype(sources: Sources, table: Table) -> np.dtype:
    """The dtype of most bytes that the table takes; float32 if it takes none."""
    sizes: dict[np.dtype, int] = {}
    for rule in table.rules:
        if info := sources.infos.get(rule.source):
            sizes[np.dtype(info.dtype)] = sizes.get(np.dtype(info.dtype), 0) + info.nbytes
    return max(sizes, key=sizes.get, default=np.dtype(np.float32))


def _is_float(dtype: np.dtype) -> bool:
    return dtype in FLOATS or dtype == np.float64


# ---- values that are no numbers ----
def not_finite(array: np.ndarray, block: int = 2**20) -> str | None:
    """ "NaN" or "infinite" if any value is, else None; by the exponent bits, a cache's worth at a time."""
    bits = {2: (np.uint16, 0x7F80 if array.dtype == ml_dtypes.bfloat16 else 0x7C00, 0x7FFF), 4: (np.uint32, 0x7F800000, 0x7FFFFFFF)}.get(
        array.itemsize
    )
    if bits is None:
        return "NaN" if np.isnan(array).any() else "infinite" if np.isinf(array).any() else None
    kind, infinity, mask = bits
    flat, worst = np.ascontiguousarray(array).reshape(-1).view(kind), 0
    for i in range(0, flat.size, block):
        worst = max(worst, int((flat[i : i + block] & kind(mask)).max()))
    return "NaN" if worst > infinity else "infinite" if worst == infinity else None


def blocks_of(target: Target, chunk: tuple[int, ...], limit: int = 32 * 2**20) -> Iterator[Index]:
    """Rectangles that cover the parameter, in the order of the file, each of whole chunks and about `limit` bytes at most where chunks allow.

    Several small layers of a stack are one block, a large layer is several; new parameters are drawn by whole layers.
    """
    if not target.shape:
        yield ()
        return
    whole = tuple(slice(0, n) for n in target.shape)
    if not target.stacked:
        yield from _cut(target, whole, target.order[0], chunk, limit)
        return
    for index in _cut(target, whole, 0, chunk, limit):
        single = index[0].stop - index[0].start == 1
        yield from _cut(target, index, target.order[1], chunk, limit) if single and target.rules and len(target.shape) > 1 else [index]


def _cut(target: Target, index: Index, axis: int, chunk: tuple[int, ...], limit: int) -> Iterator[Index]:
    """A rectangle cut along one axis."""
    others = math.prod(s.stop - s.start for i, s in enumerate(index) if i != axis) * target.dtype.itemsize or 1
    step = max(1, limit // (others * chunk[axis])) * chunk[axis]
    for start in range(index[axis].start, index[axis].stop, step):
        yield (*index[:axis], slice(start, min(start + step, index[axis].stop)), *index[axis + 1 :])
