"""Static batches: an item's result must not depend on which items happen to be drawn beside it.

A row of a batch depends on its own prompt and keys alone, but products of other shapes may be rounded differently. So an item always
meets the same shapes: its length is padded to a bucket that its own length decides, and every batch has the same number of rows.
Rows that no item needs repeat the first item. Then an item drawn alone equals the item in any batch, to the bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHORTEST = 32


@dataclass(frozen=True)
class Batch:
    """Items of one length bucket: `rows` of them, the last batch of a bucket may have fewer."""

    items: tuple[Any, ...]
    length: int
    rows: int

    @property
    def filled(self) -> list[Any]:
        """The items, filled up to the number of rows."""
        return [self.items[i] for i in row_indices(len(self.items), self.rows)[0]]


def row_indices(n: int, rows: int) -> list[np.ndarray]:
    """Indices of n rows in batches of `rows`. What the last batch lacks repeats the first row, so that all batches have one shape."""
    return [np.where(index < n, index, 0) for index in np.arange(-(-n // rows) * rows).reshape(-1, rows)]


def bucket(length: int, steps: int = 1) -> int:
    """The padded length of a prompt: powers of two from `SHORTEST` on, each octave cut into `steps`."""
    if length <= SHORTEST:
        return SHORTEST
    step = max(1, (1 << (length - 1).bit_length() - 1) // steps)
    return -(-length // step) * step


def make_batches(items: Sequence[Any], lengths: Sequence[int], rows: int, steps: int = 1) -> list[Batch]:
    """Groups items by bucket, in their order. Longest first: what does not fit into memory fails at once."""
    groups: dict[int, list[Any]] = defaultdict(list)
    for item, length in zip(items, lengths, strict=True):
        groups[bucket(length, steps)].append(item)
    return [
        Batch(tuple(group[first : first + rows]), length, rows)
        for length, group in sorted(groups.items(), reverse=True)
        for first in range(0, len(group), rows)
    ]


def item_keys(seed: int, suite: str, ids: Sequence[str], repeats: int, purpose: int) -> jax.Array:
    """One key per item and repeat [P, R], from (seed, purpose, suite, id, repeat): any image can be drawn again alone."""
    digests = [hashlib.sha256(f"{suite}\n{name}".encode()).digest()[:8] for name in ids]
    words_P2 = np.frombuffer(b"".join(digests), ">u4").reshape(-1, 2).astype(np.uint32)
    return _fold(np.uint32(seed), words_P2, repeats, purpose)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fold(seed: Any, words_P2: Any, repeats: int, purpose: int) -> jax.Array:
    root = jax.random.fold_in(jax.random.key(seed), purpose)

    def of_item(words):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(repeats))

    return jax.vmap(of_item)(words_P2)
