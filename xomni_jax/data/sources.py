"""The rendered set as grain data: endless or counted, seeded, split over hosts, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from xomni_jax.data.rendered import Example, RenderedConfig, draw_size, render_example

_ENDLESS = 2**40  # batches; grain counts with 64-bit integers
_ARRAYS = ("image", "columns")


def rendered_dataset(
    config: RenderedConfig,
    seed: int,
    batch_size: int,
    *,
    rows: Sequence[int] | None = None,
    batches: int | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
    prefetch: int = 2,
) -> grain.IterDataset:
    """Batches of rendered examples as a grain IterDataset, endless unless `batches` says how many.

    `batch_size` counts examples over all hosts; `rows` are those of every batch that this host renders (None: all), so that batches do
    not depend on the number of hosts, nor does an iterator's state: it counts batches. All examples of a batch have one size, drawn by
    weight per batch and the same on every host: shapes are static and every batch is full. `transform` maps a collated batch (see
    `collate`). One thread renders `prefetch` batches ahead; 0 renders in the caller's thread. Iterators have `get_state()` and
    `set_state()`. Raises ValueError when there is no batch, or a row that it has not.
    """
    rows = range(batch_size) if rows is None else tuple(rows)
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"batch_size={batch_size}, rows {tuple(rows)}: need rows from 0 to below batch_size")

    def batch(number: int) -> dict[str, Any]:
        number = int(number)
        size = draw_size(seed, number, config)
        return collate([render_example(seed, number * batch_size + row, config, size) for row in rows])

    dataset = grain.MapDataset.range(_ENDLESS if batches is None else batches).map(batch)
    if transform is not None:
        dataset = dataset.map(transform)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch))


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples of one size -> one dict: `image` uint8 [B, H, W, 3] and `columns` int32 [B, Y, X] stacked, the rest lists."""
    return {k: np.stack([e[k] for e in examples]) if k in _ARRAYS else [e[k] for e in examples] for k in examples[0]}
