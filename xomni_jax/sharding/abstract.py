"""Arguments of a program as shapes with shardings: nothing is allocated, and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from xomni_jax.sharding.rules import spec_for


def path_name(path: Sequence[Any]) -> str:
    """A tree path as "a/b/c"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


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


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    """(path, array) of every array of a tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(filter(None, (name, path_name(path)))), leaf


def bytes_per_device(tree: Any) -> int:
    """Bytes a device holds of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * item_size(x.dtype) for _, x in leaves(tree))


def item_size(dtype: Any) -> int:
    """Bytes of an element; PRNG keys are two words."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def repeated(tree: Any, at_least: int = 2**20, axes: tuple[str, ...] = ("fsdp", "tensor")) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Large arrays that devices along the mesh axes `axes` hold more than once: (path, shape, copies, bytes on a device), largest first."""
    out = []
    for name, x in leaves(tree):
        mesh = x.sharding.mesh
        used = {a for entry in x.sharding.spec for a in ((entry,) if isinstance(entry, str) else entry or ())}
        copies = math.prod(mesh.shape[a] for a in axes if a not in used)
        size = math.prod(x.sharding.shard_shape(x.shape)) * item_size(x.dtype)
        if copies > 1 and size >= at_least:
            out.append((name, x.shape, copies, size))
    return sorted(out, key=lambda row: -row[3])
