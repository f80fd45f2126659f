"""Conversion between PyTorch tensors and linen parameters: a declarative table per model, planned before a byte moves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class ConversionError(ValueError):
    """A checkpoint does not fit its table. The message is one sentence, or lists every problem, one a line."""

    @classmethod
    def of(cls, problems: Sequence[str]) -> ConversionError:
        """One error for all problems."""
        problems = list(dict.fromkeys(problems))
        return cls(problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems))


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
    """One source key to one target: `target` is a "/"-joined parameter path, `layer` the row of a scanned (stacked) target.

    `part` is (axis, index) within that row (or within the whole of an unstacked target): where the source keeps apart what is one
    parameter here, such as the q of a fused qkv.
    """

    source: str
    target: str
    fit: Fit = COPY
    layer: int | None = None
    part: tuple[int, int] | None = None

    def place(self, rank: int) -> tuple[int | slice, ...]:
        """Index of this rule's values in its target of `rank` axes."""
        index: list[int | slice] = [slice(None)] * rank
        if self.layer is not None:
            index[0] = self.layer
        if self.part is not None:
            index[self.part[0] + (self.layer is not None)] = self.part[1]
        return tuple(index)


class Drop(NamedTuple):
    """Source keys (full regular-expression match) that are known and not used, and why."""

    pattern: str
    reason: str


class Make(NamedTuple):
    """A target that no source fills: a new parameter. `how` says how it starts, `draw` makes one layer of it (or all of an unstacked one).

    `stacked`: the first axis of the target is the layers'.
    """

    target: str
    how: str
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    stacked: bool = False


class Table(NamedTuple):
    """All rules of one model."""

    rules: Sequence[Rule]
    drops: Sequence[Drop] = ()
    makes: Sequence[Make] = ()


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


def plan(sources: Iterable[str] | Mapping[str, Any], table: Table, wanted: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """The rules that move `sources` into `wanted` ({path: shape}), complete before anything is read.

    Args:
      sources: keys, or {key: object with `shape`}, whose shapes are then checked too.

    Raises:
      ConversionError: see `problems`.
    """
    found = problems(sources, table, wanted)
    if found:
        raise ConversionError.of(found)
    return list(table.rules)


def problems(
    sources: Iterable[str] | Mapping[str, Any],
    table: Table,
    wanted: Mapping[str, tuple[int, ...]],
    found: Callable[[str], str] = str,
    absent: Callable[[str], str] | None = None,
) -> list[str]:
    """Every key without a rule, every rule without a key, every target made twice, short or not at all, every shape that does not fit.

    Args:
      found, absent: how a key that is there, and one that is not, are called in a message (with their files).
    """
    absent, keys, by_source, out = absent or found, set(sources), {}, []
    for rule in table.rules:
        if rule.source in by_source:
            out.append(f"{found(rule.source)}: two rules")
        by_source[rule.source] = rule
    for key in sorted(keys - set(by_source)):
        if drop_of(key, table) is None:
            out.append(f"{found(key)}: in the checkpoint, no rule takes it")
    out += [f"{absent(key)}: missing from the checkpoint" for key in sorted(set(by_source) - keys)]
    out += _coverage(table, wanted)
    if isinstance(sources, Mapping):
        for rule in table.rules:
            if rule.source in keys and rule.target in wanted:
                out += [f"{found(rule.source)}: {e}" for e in _misfit(rule, tuple(sources[rule.source].shape), wanted[rule.target])]
    return out


def drop_of(key: str, table: Table) -> Drop | None:
    """The drop rule that takes a source key."""
    return next((drop for drop in table.drops if re.fullmatch(drop.pattern, key)), None)


def _coverage(table: Table, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the table's targets."""
    rows: dict[str, list[tuple[int | None, int | None]]] = {}
    for rule in table.rules:
        rows.setdefault(rule.target, []).append((rule.layer, rule.part and rule.part[1]))
    axes = {rule.target: rule.part[0] for rule in table.rules if rule.part}
    made = [make.target for make in table.makes]
    filled = set(rows) | set(made)
    out = [f"{t}: in the table, not in the model" for t in sorted(filled - set(wanted))]
    out += [f"{t}: in the model, no rule fills it" for t in sorted(set(wanted) - filled)]
    out += [f"{t}: made twice" for t in sorted({t for t in made if made.count(t) > 1 or t in rows})]
    for target in sorted(set(rows) & set(wanted)):
        stacked, shape = rows[target][0][0] is not None, wanted[target]
        layers = range(shape[0]) if stacked else [None]
        parts = range(shape[axes[target] + stacked]) if target in axes else [None]
        expected = [(layer, part) for layer in layers for part in parts]
        if sorted(rows[target], key=str) != sorted(expected, key=str):
            got, want = ([r[0] if target not in axes else r for r in side] for side in (rows[target], expected))
            out.append(f"{target}: filled by layers {got}, expected {want}")
    return out


def _misfit(rule: Rule, shape: tuple[int, ...], target: tuple[int, ...]) -> list[str]:
    """[why a source of this shape does not fill the rule's place], or []. No values are touched: a zero-stride stand-in is reshaped."""
    stand_in = np.broadcast_to(np.int8(0), shape)
    expected = np.broadcast_to(np.int8(0), target)[rule.place(len(target))].shape
    try:
        got = rule.fit.to_jax(stand_in).shape
    except (ValueError, IndexError):
        return [f"shape {shape} cannot be turned {rule.fit.name}"]
    return [] if got == expected else [f"shape {got} after {rule.fit.name}, {rule.target} wants {expected}"]


def to_params(tensors: Mapping[str, np.ndarray], table: Table, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """PyTorch tensors {key: array} -> nested linen parameters with the shapes `wanted` ({path: shape}); dtypes are kept."""
    flat: dict[str, np.ndarray] = {}
    for rule in plan(tensors, table, wanted):
        value, shape = rule.fit.to_jax(np.asarray(tensors[rule.source])), wanted[rule.target]
        if rule.layer is None and rule.part is None:
            flat[rule.target] = np.ascontiguousarray(value)
        else:
            flat.setdefault(rule.target, np.empty(shape, value.dtype))[rule.place(len(shape))] = value
    return unflatten(flat)


def to_tensors(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """Linen parameters -> PyTorch tensors {key: array}, by the same table read backwards."""
    flat = flatten(params)
    return {
        rule.source: np.ascontiguousarray(rule.fit.to_torch(np.asarray(flat[rule.target])[rule.place(np.ndim(flat[rule.target]))]))
        for rule in table.rules
    }
