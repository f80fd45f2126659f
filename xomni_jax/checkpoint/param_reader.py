"""Reads our parameters from a checkpoint's tensors, one rectangle of a parameter at a time; only that rectangle is held in memory."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from xomni_jax.checkpoint.conversion import Init, NameTable, Rule
from xomni_jax.checkpoint.tensor_file import contiguous_strides
from xomni_jax.checkpoint.tensors import TensorFiles

INFINITY_BITS = {np.dtype(np.float32): 0x7F800000, np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}
FLOATS = tuple(INFINITY_BITS)
TILE = (16, 4096)  # elements: small enough for the caches, which makes a strided copy eight times faster than a plain transposed assignment
Index = tuple[slice, ...]


@dataclass
class ParamReader:
    """Reads any rectangle of one parameter.

    Attributes:
      path, shape, dtype: of the parameter.
      rules: what fills it; without any, `init` draws it from `seed`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sources: TensorFiles
    rules: list[Rule] = field(default_factory=list)
    init: Init | None = None
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return self.init.stacked if self.init else self.rules[0].layer is not None

    @property
    def order(self) -> tuple[int, ...]:
        """Axes by their stride in the source file, largest first: blocks along the first axis are read in the order of the file."""
        if self.init:
            return tuple(range(len(self.shape)))
        rule = self.rules[0]
        shape = self.sources.infos[rule.source].shape
        # A stand-in with the strides of the file's array, but without its memory.
        array = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, contiguous_strides(shape, 1), writeable=False)
        strides = rule.transform.to_jax(array).strides
        free = [axis for axis, at in enumerate(rule.place(len(self.shape))) if isinstance(at, slice)]
        fixed = [axis for axis in range(len(self.shape)) if axis not in free]
        return (*fixed, *sorted(free, key=lambda axis: -strides[free.index(axis)]))

    def read(self, index: Index | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The rectangle `index` (by default the whole parameter), C-ordered, in the parameter's dtype; in `out` where that is given."""
        spans = [range(*s.indices(n)) for s, n in zip(index or (slice(None),) * len(self.shape), self.shape, strict=True)]
        out = np.empty(tuple(map(len, spans)), self.dtype) if out is None else out
        if self.init:
            self._draw(spans, out)
        for rule in self.rules:
            value, out_at = self.rule_view(rule, spans)
            if value is not None and value.size:
                copy_strided(out[out_at], value)
        return out

    def rule_view(self, rule: Rule, spans: list[range]) -> tuple[np.ndarray | None, tuple[int | slice, ...]]:
        """(the part of the rule's tensor that lies in the rectangle, its index there), or (None, ()) if no part does."""
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
        return rule.transform.to_jax(self.sources.read(rule.source))[tuple(value_at)], tuple(out_at)

    def release(self) -> None:
        """Frees the memory that reading filled."""
        for rule in self.rules:
            self.sources.release(rule.source)

    def _draw(self, spans: list[range], out: np.ndarray) -> None:
        # Each layer is drawn whole and from its own seed, so that the values do not depend on how hosts and devices split the array.
        at = tuple(slice(s.start, s.stop) for s in spans)
        layers = spans[0] if self.stacked else [None]
        for layer in layers:
            rng = np.random.default_rng([self.seed, zlib.crc32(self.path.encode()), 0 if layer is None else layer + 1])
            values = self.init.initializer.draw(rng, self.shape if layer is None else self.shape[1:])
            if layer is None:
                out[...] = values[at]
            else:
                out[layer - spans[0].start] = values[at[1:]]


def copy_strided(out: np.ndarray, value: np.ndarray) -> None:
    """out[...] = value, cast to out's dtype; tile by tile where the axes of the two are in different orders in memory."""
    if out.dtype == value.dtype:  # numpy copies its own integers faster than bfloat16, and without Python's lock
        out, value = out.view(f"u{out.itemsize}"), value.view(f"u{out.itemsize}")
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
    """The same memory viewed with two axes, or None if no grouping of the axes allows it."""
    for split in range(1, value.ndim):
        shape = math.prod(value.shape[:split]), math.prod(value.shape[split:])
        try:
            return value.reshape(shape, copy=False)
        except ValueError:
            continue
    return None


def param_readers(
    table: NameTable, wanted: Mapping[str, tuple[int, ...]], sources: TensorFiles, dtype: np.dtype | None, seed: int = 0
) -> tuple[list[ParamReader], list[str]]:
    """(a reader of each parameter of one component, what is wrong with the dtypes).

    Args:
      table: checked by `conversion.problems`.
      wanted: {path: shape} of the parameters.
      dtype: of every parameter. None keeps the stored dtypes; new parameters then take the one that most bytes have.
    """
    rules: dict[str, list[Rule]] = {}
    for rule in table.rules:
        rules.setdefault(rule.target, []).append(rule)
    inits, readers, wrong = {init.target: init for init in table.inits}, [], []
    usual = usual_dtype(sources, table)
    for path, shape in wanted.items():
        mine = rules.get(path, [])
        dtypes = {rule.source: np.dtype(sources.infos[rule.source].dtype) for rule in mine}
        quantised = "whole numbers or 8-bit floats are quantised weights; give the unquantised checkpoint"
        wrong += [f"{sources.describe(key)}: {kind.name}, {quantised}" for key, kind in dtypes.items() if not _is_float(kind)]
        first = next(iter(dtypes.values()), usual)
        if dtype is None:
            other = next((key for key, kind in dtypes.items() if kind != first), None)
            if other:
                mixed = f"{dtypes[other].name}, but {first.name} in other layers of {path}"
                wrong.append(f"{sources.describe(other)}: {mixed}; choose one with --dtype")
            elif _is_float(first) and first not in FLOATS:
                wrong.append(f"{sources.describe(next(iter(dtypes)))}: {first.name} is not kept; choose --dtype float32 or bfloat16")
        readers.append(ParamReader(path, tuple(shape), first if dtype is None else np.dtype(dtype), sources, mine, inits.get(path), seed))
    return readers, wrong


def usual_dtype(sources: TensorFiles, table: NameTable) -> np.dtype:
    """The dtype that most bytes of the table's tensors have; float32 without tensors."""
    sizes: dict[np.dtype, int] = {}
    for rule in table.rules:
        if info := sources.infos.get(rule.source):
            sizes[np.dtype(info.dtype)] = sizes.get(np.dtype(info.dtype), 0) + info.nbytes
    return max(sizes, key=sizes.get, default=np.dtype(np.float32))


def _is_float(dtype: np.dtype) -> bool:
    return dtype in FLOATS or dtype == np.float64


def not_finite(array: np.ndarray, block: int = 2**20) -> str | None:
    """The worst kind of value, "NaN" or "infinite", or None if all are finite; `block` values at a time, which fit into the caches."""
    if array.dtype not in INFINITY_BITS:
        return "NaN" if np.isnan(array).any() else "infinite" if np.isinf(array).any() else None
    # Without its sign bit, an integer view of a float orders as finite < infinite < NaN; numpy has no fast test for bfloat16.
    infinity, bits = INFINITY_BITS[array.dtype], np.dtype(f"u{array.itemsize}").type
    mask = np.iinfo(bits).max >> 1
    flat, worst = np.ascontiguousarray(array).reshape(-1).view(bits), 0
    for i in range(0, flat.size, block):
        worst = max(worst, int((flat[i : i + block] & bits(mask)).max()))
    return "NaN" if worst > infinity else "infinite" if worst == infinity else None


def blocks_of(param: ParamReader, chunk: tuple[int, ...], limit: int = 32 * 2**20) -> Iterator[Index]:
    """Rectangles that cover the parameter in the order of the file, made of whole chunks and of about `limit` bytes at most.

    Several small layers of a stack make one block, a large layer makes several. New parameters are drawn in whole layers.
    """
    if not param.shape:
        yield ()
        return
    whole = tuple(slice(0, n) for n in param.shape)
    if not param.stacked:
        yield from _cut(param, whole, param.order[0], chunk, limit)
        return
    for index in _cut(param, whole, 0, chunk, limit):
        single = index[0].stop - index[0].start == 1
        yield from _cut(param, index, param.order[1], chunk, limit) if single and param.rules and len(param.shape) > 1 else [index]


def chunks_of(index: Index, chunk: tuple[int, ...]) -> Iterator[Index]:
    """The chunks that make up a block of `blocks_of`."""
    starts = itertools.product(*(range(s.start, s.stop, n) for s, n in zip(index, chunk, strict=True)))
    return (tuple(slice(i, min(i + n, s.stop)) for i, n, s in zip(start, chunk, index)) for start in starts)


def _cut(param: ParamReader, index: Index, axis: int, chunk: tuple[int, ...], limit: int) -> Iterator[Index]:
    """Cuts a rectangle along one axis."""
    others = math.prod(s.stop - s.start for i, s in enumerate(index) if i != axis) * param.dtype.itemsize or 1
    step = max(1, limit // (others * chunk[axis])) * chunk[axis]
    for start in range(index[axis].start, index[axis].stop, step):
        yield (*index[:axis], slice(start, min(start + step, index[axis].stop)), *index[axis + 1 :])
