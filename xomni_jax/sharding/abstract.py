"""Arguments of a program as shapes with shardings: nothing is allocated, and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from xomni_jax.sharding.rules import spec_for


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """One array; `axes` are logical names of its first dimensions, the others stay whole."""
    axes = axes + (None,) * (len(shape) - len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec_for("input", shape, axes, mesh)))


def rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose rows are split as batches are."""
    return array(mesh, shape, dtype, "batch")


def keys(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
    """PRNG keys."""
    return array(mesh, shape, jax.eval_shape(lambda: jax.random.key(0)).dtype, *axes)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def leaves(tree: Any) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    """(path, array) of every array of a tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def bytes_per_device(tree: Any) -> int:
    """Bytes a device holds of a tree."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes a device holds of an array."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def repeated(tree: Any, at_least: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Arrays of at least `at_least` bytes on a device, of which the devices along fsdp and tensor hold several copies.

    Returns:
      (path, shape, copies, bytes on a device), largest first.
    """
    out = []
    for name, x in leaves(tree):
        mesh = x.sharding.mesh
        used = {a for entry in x.sharding.spec for a in ((entry,) if isinstance(entry, str) else entry or ())}
        copies = math.prod(mesh.shape[a] for a in ("fsdp", "tensor") if a not in used)
        if copies > 1 and shard_bytes(x) >= at_least:
            out.append((name, x.shape, copies, shard_bytes(x)))
    return sorted(out, key=lambda row: -row[3])
