"""The batch driver: any number of items run through a jitted program whose batches have one fixed size.

The last batch is filled with copies of its first item, and the surplus results are cut off. A row's result does not depend on the
other rows, except that programs of other shapes may round differently: an item whose program always has the same shapes
(`batches_by_shape` with one size) gives the same result, bit for bit, whichever items run beside it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from xomni_jax.sharding.arrays import whole

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of a program.

    Attributes:
      items: the items it computes, by their index. size: rows of the program, at least as many.
      shape: what the items have in common: the padded length of their prompts, say, or the size of their images.
    """

    items: tuple[int, ...]
    size: int
    shape: Any = None

    def take(self, rows: Any) -> Any:
        """The `size` rows of this batch out of all items' rows: an array [items, ...] or a list."""
        index = np.array(self.items + self.items[:1] * (self.size - len(self.items)))
        if not isinstance(rows, (np.ndarray, jax.Array)):
            return [rows[i] for i in index]
        return rows if len(rows) == self.size and np.array_equal(index, np.arange(self.size)) else rows[index]

    def cut(self, results: Any) -> Any:
        """A tree of arrays [size, ...] or a list, without the rows that only fill the batch."""
        if len(self.items) == self.size:
            return results
        return jax.tree.map(lambda x: x[: len(self.items)], results, is_leaf=lambda x: isinstance(x, list))


def make_batches(items: int, size: int) -> list[Batch]:
    """`items` items in their order, `size` at a time."""
    return batches_by_shape([0] * items, size)


def batches_by_shape(shapes: Sequence[Any], size: int) -> list[Batch]:
    """Items of one shape share batches, in their order; `shapes` has one entry per item, such as `padding.bucket` of its prompt.

    Largest first: what does not fit into memory fails at once, and estimates of the remaining time are too long rather than too short.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    return [
        Batch(tuple(group[first : first + size]), size, shape)
        for shape, group in sorted(groups.items(), reverse=True)
        for first in range(0, len(group), size)
    ]


def run_batches(program: Callable[[Batch], Any], batches: Iterable[Batch]) -> Iterator[tuple[Batch, Any]]:
    """(batch, its results without surplus rows as numpy arrays), in order.

    Args:
      program: starts a batch and returns a tree of device arrays [size, ...] without waiting for them. The next batch is started
        before the results of the one before are fetched, so that the device computes while the host works on those.
    """
    waiting = None
    for batch in batches:
        started = batch, program(batch)
        if waiting is not None:
            yield _fetch(*waiting)
        waiting = started
    if waiting is not None:
        yield _fetch(*waiting)


def _fetch(batch: Batch, results: Any) -> tuple[Batch, Any]:
    return batch, batch.cut(jax.tree.map(whole, results))


def in_order(results: Iterable[tuple[Batch, Sequence[T]]]) -> list[T]:
    """The rows of all batches, in the order of their items."""
    rows = {i: row for batch, part in results for i, row in zip(batch.items, part, strict=True)}
    return [rows[i] for i in sorted(rows)]
