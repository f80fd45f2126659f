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
    shard_index: int = 0,
    shard_count: int = 1,
    batches: int | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
    prefetch: int = 2,
) -> grain.IterDataset:
    """Batches of rendered examples as a grain IterDataset, endless unless `batches` says how many.

    `batch_size` counts examples over all hosts; each of `shard_count` hosts gets its own `batch_size / shard_count` of every
    batch, in order, so the data does not depend on the number of hosts. All examples of a batch have one size, drawn by weight
    per batch and the same on every host: shapes are static and every batch is full. `transform` maps a collated batch (see
    `collate`). One thread renders `prefetch` batches ahead; 0 renders in the caller's thread. Iterators have `get_state()` and
    `set_state()`. Raises ValueError when the batch does not divide over the hosts.
    """
    if batch_size < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_size={batch_size}, shard {shard_index} of {shard_count}: need a batch and 0 <= shard_index < shard_count."
        )
    if batch_size % shard_count:
        raise ValueError(f"batch_size={batch_size} does not divide over {shard_count} hosts; use a multiple of {shard_count}.")
    local = batch_size // shard_count

    def batch(number: int) -> dict[str, Any]:
        number = int(number)
        size = draw_size(seed, number, config)
        first = number * batch_size + shard_index * local
        return collate([render_example(seed, first + k, config, size) for k in range(local)])

    dataset = grain.MapDataset.range(_ENDLESS if batches is None else batches).map(batch)
    if transform is not None:
        dataset = dataset.map(transform)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch))


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples of one size -> one dict: `image` uint8 [B, H, W, 3] and `columns` int32 [B, Y, X] stacked, the rest lists."""
    return {k: np.stack([e[k] for e in examples]) if k in _ARRAYS else [e[k] for e in examples] for k in examples[0]}
