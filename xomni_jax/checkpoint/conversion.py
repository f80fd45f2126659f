"""Conversion between PyTorch tensors and linen parameters: one declarative table per model, checked in full before any tensor is read."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class ConversionError(ValueError):
    """A checkpoint does not fit its table. The message is one sentence, or lists every problem on a line of its own."""

    @classmethod
    def of(cls, problems: Sequence[str]) -> ConversionError:
        """One error for all problems."""
        problems = list(dict.fromkeys(problems))
        return cls(problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems))


class Transform(NamedTuple):
    """A reversible change of one tensor's layout: `to_jax` maps the PyTorch array to ours, `to_torch` is its inverse."""

    name: str
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


COPY = Transform("copy", lambda x: x, lambda x: x)
TRANSPOSE = Transform("[O,I] -> [I,O]", np.transpose, np.transpose)
CONV = Transform("[O,I,Y,X] -> [Y,X,I,O]", lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# A 1x1 convolution is a matrix here.
POINTWISE = Transform("[O,I,1,1] -> [I,O]", lambda w: w[:, :, 0, 0].T, lambda w: np.ascontiguousarray(w.T)[:, :, None, None])


def out_axes(*sizes: int) -> Transform:
    """[O, I] -> [I, *sizes], where the sizes multiply to O."""
    return Transform(f"[O,I] -> [I,{','.join(map(str, sizes))}]", lambda w: w.T.reshape(-1, *sizes), lambda w: w.reshape(w.shape[0], -1).T)


def in_axes(*sizes: int) -> Transform:
    """[O, I] -> [*sizes, O], where the sizes multiply to I."""
    return Transform(f"[O,I] -> [{','.join(map(str, sizes))},O]", lambda w: w.T.reshape(*sizes, -1), lambda w: w.reshape(-1, w.shape[-1]).T)


def bias_axes(*sizes: int) -> Transform:
    """[O] -> [*sizes]."""
    return Transform(f"[O] -> [{','.join(map(str, sizes))}]", lambda b: b.reshape(sizes), lambda b: b.reshape(-1))


class Rule(NamedTuple):
    """Maps one source key to one parameter.

    Attributes:
      source: the key in the PyTorch file. target: the "/"-joined parameter path.
      layer: index of the layer, if the parameter is a stack of all layers.
      part: (axis, index) within the layer, if several keys fill one parameter, such as q, k and v of a fused qkv.
    """

    source: str
    target: str
    transform: Transform = COPY
    layer: int | None = None
    part: tuple[int, int] | None = None

    def place(self, rank: int) -> tuple[int | slice, ...]:
        """Index of this rule's values in its target, which has `rank` axes."""
        index: list[int | slice] = [slice(None)] * rank
        if self.layer is not None:
            index[0] = self.layer
        if self.part is not None:
            index[self.part[0] + (self.layer is not None)] = self.part[1]
        return tuple(index)


def weight_and_bias(
    source: str, target: str, weight: Transform = TRANSPOSE, bias: Transform = COPY, layer: int | None = None, leaf: str = "kernel"
) -> list[Rule]:
    """The rules of a layer that has both."""
    return [Rule(f"{source}.weight", f"{target}/{leaf}", weight, layer), Rule(f"{source}.bias", f"{target}/bias", bias, layer)]


def norm_rules(source: str, target: str, layer: int | None = None) -> list[Rule]:
    """The rules of a normalisation that has scale and bias."""
    return weight_and_bias(source, target, COPY, layer=layer, leaf="scale")


class Ignored(NamedTuple):
    """Source keys (full match of a regular expression) that are known but not used, and the reason."""

    pattern: str
    reason: str


class Initializer(NamedTuple):
    """How a parameter starts: a description for reports, and a function of a generator and a shape."""

    description: str
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


class Init(NamedTuple):
    """A parameter that no source key fills. If its first axis counts layers (`stacked`), each layer is drawn on its own."""

    target: str
    initializer: Initializer
    stacked: bool = False


class NameTable(NamedTuple):
    """All rules of one model."""

    rules: Sequence[Rule]
    ignored: Sequence[Ignored] = ()
    inits: Sequence[Init] = ()


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


def problems(
    sources: Mapping[str, Any],
    table: NameTable,
    wanted: Mapping[str, tuple[int, ...]],
    describe: Callable[[str], str] = str,
    describe_missing: Callable[[str], str] = str,
) -> list[str]:
    """What is wrong: keys without a rule, rules without a key, parameters filled twice, partly or not at all, shapes that do not fit.

    Args:
      sources: {key: object with a shape}. wanted: {path: shape} of the parameters.
      describe, describe_missing: name a key that exists, and one that does not, in a message (with their files).
    """
    keys, taken = set(sources), [rule.source for rule in table.rules]
    out = [f"{describe(key)}: two rules" for key, n in collections.Counter(taken).items() if n > 1]
    unknown = [key for key in sorted(keys.difference(taken)) if ignored_rule(key, table) is None]
    out += [f"{describe(key)}: in the checkpoint, no rule takes it" for key in unknown]
    out += [f"{describe_missing(key)}: missing from the checkpoint" for key in sorted(set(taken) - keys)]
    out += _coverage(table, wanted)
    for rule in table.rules:
        if rule.source in keys and rule.target in wanted:
            out += [f"{describe(rule.source)}: {e}" for e in _misfit(rule, tuple(sources[rule.source].shape), wanted[rule.target])]
    return out


def ignored_rule(key: str, table: NameTable) -> Ignored | None:
    """The entry of the table that says to ignore a source key."""
    return next((entry for entry in table.ignored if re.fullmatch(entry.pattern, key)), None)


def _coverage(table: NameTable, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the table's targets."""
    rows: dict[str, list[tuple[int | None, int | None]]] = {}
    for rule in table.rules:
        rows.setdefault(rule.target, []).append((rule.layer, rule.part and rule.part[1]))
    axes = {rule.target: rule.part[0] for rule in table.rules if rule.part}
    made = [init.target for init in table.inits]
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
    """Why a source of this shape does not fit its place in the target, or []; tried on an array that takes no memory."""
    stand_in = np.broadcast_to(np.int8(0), shape)
    expected = np.broadcast_to(np.int8(0), target)[rule.place(len(target))].shape
    try:
        got = rule.transform.to_jax(stand_in).shape
    except (ValueError, IndexError):
        return [f"shape {shape} cannot be turned {rule.transform.name}"]
    return [] if got == expected else [f"shape {got} after {rule.transform.name}, {rule.target} wants {expected}"]
