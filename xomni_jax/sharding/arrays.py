"""Transfer of batches between hosts and the mesh. With one process it holds every row, and nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xomni_jax.core.distributed import gather_json
from xomni_jax.sharding.rules import RULES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first dimension as the table splits "batch"."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def rows_of(mesh: Mesh, n: int) -> dict[int, list[int]]:
    """{process: rows of a batch of n that its devices hold, in order}. With several processes n must divide over the mesh."""
    if jax.process_count() == 1:
        return {0: list(range(n))}
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in batch_sharding(mesh).devices_indices_map((n,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(n)))
    return {process: sorted(rows) for process, rows in held.items()}


def local_rows(mesh: Mesh, n: int) -> list[int]:
    """Rows of a batch of n that this process's devices hold. Other processes hold them too where a tensor axis crosses hosts."""
    return rows_of(mesh, n)[jax.process_index()]


def owned_rows(mesh: Mesh, n: int) -> list[int]:
    """Rows of a batch of n that this process owns: of the processes that hold a row, the first owns it."""
    held = rows_of(mesh, n)
    others = {row for process, rows in held.items() if process < jax.process_index() for row in rows}
    return [row for row in held[jax.process_index()] if row not in others]


def spread(mesh: Mesh, rows: Any, n: int) -> Any:
    """Tree of arrays of this process's `local_rows` -> tree of global arrays of n rows on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), (n, *np.shape(x)[1:])), rows)


def rows_here(x: jax.Array, rows: Sequence[int]) -> np.ndarray:
    """Rows, held by this process, of an array split by `batch_sharding` -> numpy array."""
    if x.is_fully_addressable:
        return np.asarray(x)[np.asarray(rows, int)]
    held: dict[int, np.ndarray] = {}
    for shard in x.addressable_shards:
        held.update(zip(range(*shard.index[0].indices(x.shape[0])), np.asarray(shard.data)))
    return np.stack([held[row] for row in rows]) if rows else np.zeros((0, *x.shape[1:]), x.dtype)


def whole(x: jax.Array) -> np.ndarray:
    """A (small) array in full on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    with jax.set_mesh(x.sharding.mesh):  # the caller may have set another
        return multihost_utils.process_allgather(x, tiled=True)


def share(columns: Mapping[str, Sequence[Any]], rows: Sequence[int], n: int) -> dict[str, list[Any]]:
    """Columns of JSON values with this process's rows -> the columns with all n rows, on every host."""
    if jax.process_count() == 1:
        return {name: list(values) for name, values in columns.items()}
    out = {name: [None] * n for name in columns}
    for part in gather_json({"rows": list(rows), "columns": {name: list(values) for name, values in columns.items()}}):
        for name, values in part["columns"].items():
            for row, value in zip(part["rows"], values, strict=True):
                out[name][row] = value
    return out
