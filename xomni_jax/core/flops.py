"""Counts the operations of a traced program in its jaxpr: over all devices, loop bodies once per iteration; nothing is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations by kind.

    Attributes:
      weights: matrix products of activations with weights, and of activations for the gradient of weights.
      attention: batched products, of activations with each other.
      convolution: 2-D convolutions. kernels: hand-written kernels, by their own estimate where they give one.
    """

    weights: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: float) -> Flops:
        return Flops(*(a * times for a in dataclasses.astuple(self)))

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))


def count(jaxpr: Any) -> Flops:
    """Operations of a (closed) jaxpr. A `while` body of unknown length counts once; of the branches of a `cond`, the costliest."""
    total = Flops()
    for eqn in _open(jaxpr).eqns:
        total += _equation(eqn)
    return total


def _equation(eqn: Any) -> Flops:
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contract, _), (batch, _) = p["dimension_numbers"]
        n = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        return Flops(attention=n) if batch else Flops(weights=n)
    if name == "conv_general_dilated":
        kernel, out = eqn.invars[1].aval.shape, p["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(kernel) / kernel[out]
        return Flops(convolution=2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output)
    if name == "pallas_call":
        return Flops(kernels=_kernel(p))
    if name == "scan":
        return count(p["jaxpr"]) * p["length"]
    if name == "cond":
        return max((count(branch) for branch in p["branches"]), key=lambda f: f.total)
    if name == "shard_map":
        return sum((count(j) for j in _inner(p)), Flops()) * _shards(eqn)
    return sum((count(j) for j in _inner(p)), Flops())


def _kernel(params: dict[str, Any]) -> float:
    estimate = params.get("cost_estimate")
    if estimate is not None and estimate.flops:
        return float(estimate.flops)
    grid = [n for n in params["grid_mapping"].grid if isinstance(n, int)]
    return math.prod(grid) * count(params["jaxpr"]).total


def _shards(eqn: Any) -> int:
    """Devices over which a shard_map splits its inputs; the others repeat their work, which is not counted."""
    used: set[str] = set()
    for spec in eqn.params["in_specs"]:
        for entry in spec or ():
            used |= set((entry,) if isinstance(entry, str) else entry or ())
    return math.prod(eqn.params["mesh"].shape[axis] for axis in used)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(_open(part), "eqns"):
                yield part


def widest(jaxpr: Any, sizes: frozenset[int]) -> tuple[int, ...]:
    """The shape, with one of `sizes` as its last axis, that has the most rows before it; () where there is none.

    With the sizes of vocabularies: the largest array of logits that ever exists.
    """
    best: tuple[int, ...] = ()
    for eqn in _open(jaxpr).eqns:
        shapes = [v.aval.shape for v in eqn.outvars if getattr(v.aval, "shape", ()) and v.aval.shape[-1] in sizes and len(v.aval.shape) > 2]
        shapes += [widest(j, sizes) for j in _inner(eqn.params)]
        best = max([best, *shapes], key=lambda s: math.prod(s[:-1]) if s else 0)
    return best
