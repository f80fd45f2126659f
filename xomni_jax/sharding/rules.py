"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("replica", "data", "fsdp", "tensor")

# Logical axis -> mesh axes. The only place that names mesh axes. None: never split.
RULES: dict[str, tuple[str, ...] | None] = {
    # activations
    "batch": ("replica", "data", "fsdp"),
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
    "lora": None,  # the rank of an adapter
    "norm": None,
    "conv": None,  # spatial extent of a convolution kernel
    "channels_in": None,
    "channels_out": ("fsdp",),
}

# Parameters of the transformer while it samples, replicated over "fsdp". A decode step takes about as long as reading the weights from HBM
# once; split over "fsdp" they would cross the network for every token.
ROLLOUT_RULES = RULES | {"embed": None}

# Activations of models that run on many rows at a time: rows are split over "tensor" as well, nothing else is. Weights stay as in RULES and
# are gathered layer by layer: 0.4 GB per layer of the MMDiT, where a split over heads would exchange 35 MB per image and projection.
SPREAD_RULES = dict.fromkeys(RULES) | {"batch": MESH_AXES}

_activation_rules: ContextVar[Mapping] = ContextVar("rules of activations", default=RULES)


def spec_for(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh, rules: Mapping = RULES
) -> PartitionSpec:
    """PartitionSpec of one tensor with one logical axis (or None) per dimension.

    Raises:
      ValueError: a size does not divide over its mesh axes; the compiler would replicate the tensor without a warning.
    """
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        over = tuple(m for m in (rules[axis] if axis else None) or () if mesh.shape.get(m, 1) > 1)
        parts = math.prod(mesh.shape[m] for m in over)
        if size % parts:
            raise ValueError(
                f"{name}{tuple(shape)}: {axis}={size} does not divide over mesh axes {over} ({parts} devices); lower that mesh axis"
            )
        entries.append(over or None)
    return PartitionSpec(*entries)


def num_data_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def constrain(x: jax.Array, *axes: str | None, name: str = "activation") -> jax.Array:
    """Constrains the sharding of an activation by its logical axes. Does nothing where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, activation_spec(name, x.shape, axes, mesh))


def activation_spec(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of an activation by the table in use: RULES, or SPREAD_RULES within `map_rows`."""
    return spec_for(name, shape, axes, mesh, _activation_rules.get())


@contextmanager
def activation_rules(rules: Mapping) -> Iterator[None]:
    """Shards activations by another table within the context."""
    token = _activation_rules.set(rules)
    try:
        yield
    finally:
        _activation_rules.reset(token)


def map_rows(fn: Callable[[Any], Any], rows: Any, microbatch: int = 0) -> Any:
    """fn(rows) for a tree of arrays [B, ...] with independent rows, at most `microbatch` rows at a time on each device; 0: all at once.

    See `microbatches` for how they are split. A microbatch takes every k-th row, so that all devices compute on rows they hold.
    """
    rules, pieces = microbatches(len(jax.tree.leaves(rows)[0]), microbatch, jax.sharding.get_abstract_mesh())
    if not pieces:
        return fn(rows)

    def piece(rows: Any) -> Any:
        with activation_rules(rules):
            out = fn(jax.tree.map(constrained, rows))
        return jax.tree.map(constrained, out)

    def constrained(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", *(None,) * (x.ndim - 1), name="rows")

    if pieces == 1:
        return piece(rows)
    interleaved = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), rows)
    out = jax.lax.map(piece, interleaved)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


def microbatches(n: int, microbatch: int, mesh: Mesh | AbstractMesh) -> tuple[Mapping, int]:
    """(table, number of equal microbatches) for n rows of `map_rows`.

    Rows are split over all devices of the mesh (SPREAD_RULES) if n divides over them, else as any batch is (RULES). If n does not divide
    over those axes either, there are 0 microbatches: the rows are not split.
    """
    rules = RULES if mesh.empty or n % mesh.size else SPREAD_RULES
    each, odd = divmod(n, math.prod(mesh.shape.get(axis, 1) for axis in rules["batch"]))
    if odd:
        return rules, 0
    return rules, next(k for k in range(1, each + 1) if each % k == 0 and (not microbatch or each // k <= microbatch))


@contextmanager
def unconstrained() -> Iterator[None]:
    """Turns `constrain` off within the context, for initialisation, which traces inputs of a single row."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        yield


def param_shardings(boxed, mesh: Mesh, rules: Mapping = RULES):
    """NamedSharding tree of a boxed parameter tree, as `jax.eval_shape(model.init, ...)["params"]` returns it.

    Every parameter must name its logical axes with `nn.with_logical_partitioning`.
    """

    def one(path, leaf: nn.Partitioned) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.value.shape, leaf.names, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
