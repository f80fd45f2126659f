"""The one table from logical axes to mesh axes, and its strict application."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("replica", "data", "fsdp", "tensor")

# Logical axis -> mesh axes. The only place that names mesh axes. None: never split.
RULES: dict[str, tuple[str, ...] | None] = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "pictures": ("replica", "data", "fsdp", "tensor"),  # rows of a convolutional model, which has nothing to split over "tensor"
    "length": None,
    "cache": None,
    "residual": None,  # the model width of an activation; parameters call theirs "embed"
    # parameters
    "layers": None,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": None,
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "code": None,  # the width of a codebook row or of another small feature
    "modulation": ("tensor",),
    "norm": None,
    "conv": None,  # spatial extent of a convolution kernel
    "channels_in": None,
    "channels_out": ("fsdp",),
}

# The transformer while it samples: whole along its width. A decode step lasts about as long as reading the weights once from HBM takes; split
# over "fsdp" they would come over the network for every token.
ROLLOUT_RULES = RULES | {"embed": None}


def spec_for(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh, rules: Mapping = RULES
) -> PartitionSpec:
    """PartitionSpec of one tensor; refuses what the compiler would quietly replicate.

    Raises:
      KeyError: a logical axis has no rule.
      ValueError: the number of axes is not the rank, a mesh axis would serve two dimensions, or a size does not divide.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{name}{tuple(shape)}: {len(axes)} logical axes {tuple(axes)} for {len(shape)} dimensions")
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes):
        if axis is not None and axis not in rules:
            raise KeyError(f"{name}: logical axis {axis!r} has no rule; known axes: {sorted(rules)}")
        over = tuple(m for m in (rules[axis] if axis else None) or () if mesh.shape.get(m, 1) > 1)
        ways = math.prod(mesh.shape[m] for m in over)
        if used & set(over):
            raise ValueError(f"{name}{tuple(shape)}: mesh axis {sorted(used & set(over))} serves two dimensions of {tuple(axes)}")
        if size % ways:
            raise ValueError(
                f"{name}{tuple(shape)}: {axis}={size} does not divide over mesh axes {over} ({ways} ways); lower that mesh axis"
            )
        used |= set(over)
        entries.append(over or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None, name: str = "activation") -> jax.Array:
    """Pins an activation to the table, by logical axis names. The identity where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(name, x.shape, axes, mesh))


def map_rows(fn: Callable[[jax.Array], jax.Array], x: jax.Array, at_once: int) -> jax.Array:
    """fn(x) for rows on their own, `at_once` per device of the mesh in scope at a time; 0: all together.

    Rows are dealt out in turn, so that those of a device stay there, and spread over the tensor axis as well, where they divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.size
    if not at_once or len(x) % (ways * at_once) or len(x) == at_once:
        return fn(x)

    def piece(rows: jax.Array) -> jax.Array:
        rows = constrain(rows, "pictures", *(None,) * (rows.ndim - 1), name="pictures")
        out = fn(rows)
        return constrain(out, "batch", *(None,) * (out.ndim - 1), name="pictures")

    out = jax.lax.map(piece, x.reshape(-1, len(x) // (ways * at_once), *x.shape[1:]).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(-1, *out.shape[2:])


@contextmanager
def unconstrained() -> Iterator[None]:
    """Within it `constrain` is the identity whatever mesh is set: for initialisation, which traces inputs of one row."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        yield


def param_shardings(boxed, mesh: Mesh, rules: Mapping = RULES):
    """NamedSharding tree of a boxed parameter tree, as `jax.eval_shape(model.init, ...)["params"]` returns it.

    Every parameter must name its logical axes (`nn.with_logical_partitioning`); an unnamed one is an error.
    """

    def one(path, leaf):
        name = "/".join(str(getattr(p, "key", p)) for p in path)
        if not isinstance(leaf, nn.Partitioned):
            raise ValueError(f"{name}: parameter names no logical axes")
        return NamedSharding(mesh, spec_for(name, leaf.value.shape, leaf.names, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
