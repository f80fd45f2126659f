"""Conversion between PyTorch tensors and linen parameters: a declarative table per model, planned before a byte moves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class ConversionError(ValueError):
    """A checkpoint does not fit its table. The message lists every problem."""


class Fit(NamedTuple):
    """A reversible change of one tensor's layout. `to_jax` takes the PyTorch array, `to_torch` undoes it."""

    name: str
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


COPY = Fit("copy", lambda x: x, lambda x: x)
TRANSPOSE = Fit("[O,I] -> [I,O]", np.transpose, np.transpose)
CONV = Fit("[O,I,Y,X] -> [Y,X,I,O]", lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))


def out_axes(*sizes: int) -> Fit:
    """[O, I] -> [I, *sizes], where the sizes multiply to O."""
    return Fit(f"[O,I] -> [I,{','.join(map(str, sizes))}]", lambda w: w.T.reshape(-1, *sizes), lambda w: w.reshape(w.shape[0], -1).T)


def in_axes(*sizes: int) -> Fit:
    """[O, I] -> [*sizes, O], where the sizes multiply to I."""
    return Fit(f"[O,I] -> [{','.join(map(str, sizes))},O]", lambda w: w.T.reshape(*sizes, -1), lambda w: w.reshape(-1, w.shape[-1]).T)


def bias_axes(*sizes: int) -> Fit:
    """[O] -> [*sizes]."""
    return Fit(f"[O] -> [{','.join(map(str, sizes))}]", lambda b: b.reshape(sizes), lambda b: b.reshape(-1))


class Rule(NamedTuple):
    """One source key to one target: `target` is a "/"-joined parameter path, `layer` the row of a scanned (stacked) target."""

    source: str
    target: str
    fit: Fit = COPY
    layer: int | None = None


class Drop(NamedTuple):
    """Source keys (full regular-expression match) that are known and not used, and why."""

    pattern: str
    reason: str


class Table(NamedTuple):
    """All rules of one model."""

    rules: Sequence[Rule]
    drops: Sequence[Drop] = ()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        out |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def plan(keys: Iterable[str], table: Table, wanted: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """The rules that move `keys` into `wanted` ({path: shape}), complete before anything is read.

    Raises:
      ConversionError: listing every key without a rule, every rule without a key, every target made twice, short or not at all.
    """
    keys, by_source, errors = set(keys), {}, []
    for rule in table.rules:
        if rule.source in by_source:
            errors.append(f"{rule.source}: two rules")
        by_source[rule.source] = rule
    for key in sorted(keys - set(by_source)):
        if not any(re.fullmatch(drop.pattern, key) for drop in table.drops):
            errors.append(f"{key}: in the checkpoint, no rule takes it")
    errors += [f"{key}: missing from the checkpoint" for key in sorted(set(by_source) - keys)]
    rows: dict[str, list[int | None]] = {}
    for rule in table.rules:
        rows.setdefault(rule.target, []).append(rule.layer)
    errors += [f"{t}: in the table, not in the model" for t in sorted(set(rows) - set(wanted))]
    errors += [f"{t}: in the model, no rule fills it" for t in sorted(set(wanted) - set(rows))]
    for target in sorted(set(rows) & set(wanted)):
        expected = [None] if rows[target] == [None] else list(range(wanted[target][0]))
        if sorted(rows[target], key=lambda r: -1 if r is None else r) != expected:
            errors.append(f"{target}: filled by layers {rows[target]}, expected {expected}")
    if errors:
        raise ConversionError(f"{len(errors)} problems:\n  " + "\n  ".join(errors))
    return list(table.rules)


def to_params(tensors: Mapping[str, np.ndarray], table: Table, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """PyTorch tensors {key: array} -> nested linen parameters with the shapes `wanted` ({path: shape}); dtypes are kept."""
    flat: dict[str, np.ndarray] = {}
    for rule in plan(tensors, table, wanted):
        value, shape = rule.fit.to_jax(np.asarray(tensors[rule.source])), wanted[rule.target]
        expected = shape if rule.layer is None else shape[1:]
        if value.shape != tuple(expected):
            raise ConversionError(f"{rule.source}: shape {value.shape} after {rule.fit.name}, {rule.target} wants {tuple(expected)}")
        if rule.layer is None:
            flat[rule.target] = np.ascontiguousarray(value)
        else:
            flat.setdefault(rule.target, np.empty(shape, value.dtype))[rule.layer] = value
    return unflatten(flat)


def to_tensors(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """Linen parameters -> PyTorch tensors {key: array}, by the same table read backwards."""
    flat = flatten(params)
    return {
        rule.source: np.ascontiguousarray(rule.fit.to_torch(np.asarray(flat[rule.target] if rule.layer is None else flat[rule.target][rule.layer])))
        for rule in table.rules
    }
