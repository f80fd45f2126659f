"""Whole models converted in memory by a name table, both ways."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xomni_jax.checkpoint.conversion import ConversionError, NameTable, Rule, flatten, problems, unflatten


def plan(sources: Mapping[str, Any], table: NameTable, wanted: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """The rules that turn `sources` into the parameters `wanted` ({path: shape}), checked without reading a tensor.

    Args:
      sources: {key: object with `shape`}.

    Raises:
      ConversionError: see `problems`.
    """
    if wrong := problems(sources, table, wanted):
        raise ConversionError.of(wrong)
    return list(table.rules)


def stand_ins(table: NameTable, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays {key: array} of the shapes that the table turns into `wanted`; they take no memory."""
    made = {rule.target: np.broadcast_to(np.int8(0), wanted[rule.target]) for rule in table.rules}
    return {rule.source: rule.transform.to_torch(made[rule.target][rule.place(made[rule.target].ndim)]) for rule in table.rules}


def to_params(tensors: Mapping[str, np.ndarray], table: NameTable, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """PyTorch tensors {key: array} -> nested linen parameters with the shapes `wanted` ({path: shape}); dtypes are kept."""
    flat: dict[str, np.ndarray] = {}
    for rule in plan(tensors, table, wanted):
        value, shape = rule.transform.to_jax(np.asarray(tensors[rule.source])), wanted[rule.target]
        if rule.layer is None and rule.part is None:
            flat[rule.target] = np.ascontiguousarray(value)
        else:
            flat.setdefault(rule.target, np.empty(shape, value.dtype))[rule.place(len(shape))] = value
    return unflatten(flat)


def to_tensors(params: Mapping[str, Any], table: NameTable) -> dict[str, np.ndarray]:
    """Linen parameters -> PyTorch tensors {key: array}, by the same table read backwards."""
    flat = flatten(params)
    return {
        rule.source: np.ascontiguousarray(rule.transform.to_torch(np.asarray(flat[rule.target])[rule.place(np.ndim(flat[rule.target]))]))
        for rule in table.rules
    }
