"""The collectives of a compiled program: kind, mesh axes, bytes, and how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from xomni_jax.planner.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, as one device sees it.

    Attributes:
      axes: the mesh axes over which devices exchange.
      bytes: of the gathered, reduced or exchanged array in one execution; for a reduce-scatter, before it is scattered.
      times: executions per run of the program.
      group_size: devices that exchange with each other.
      source: the operation of the traced program that it belongs to.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    group_size: int
    source: str

    @property
    def total(self) -> int:
        """Bytes over all executions."""
        return self.bytes * self.times

    @property
    def sent(self) -> float:
        """Bytes that a device sends per execution, in a ring."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group_size - 1) / self.group_size * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives that run. `mesh` gives the axes' sizes in the order of the mesh."""
    found, seen = [], set()
    for name, i in module.instructions():
        kind = i.op.removesuffix("-start")
        if kind not in KINDS or not i.result:
            continue
        channel = re.search(r"channel_id=(\d+)", i.rest)
        # An asynchronous collective is cloned into up to three fusions of one loop body. Other bodies may reuse its channel.
        mark = (kind, channel.group(1), module.owners.get(name)) if channel else (kind, i.name, name)
        if mark in seen:
            continue
        seen.add(mark)
        found.append(_collective(name, kind, i, mesh, module.times[name]))
    return found


def _collective(computation: str, kind: str, i: Instruction, mesh: Mapping[str, int], times: int) -> Collective:
    group = _group(i.rest, int(np.prod(list(mesh.values()))))
    sizes = [a.bytes for a in i.result]
    size = max(sizes) if i.op.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
        size *= len(group)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # the TPU compiler's form of it; the shape is that before scattering
    largest = max(i.result, key=lambda a: a.bytes)
    return Collective(kind, _axes(group, mesh), largest.dtype, largest.shape, size, times, len(group), i.source)


def _group(text: str, devices: int) -> list[int]:
    """Partition numbers of one group, from any of the notations of HLO.

    Raises:
      ValueError: the notation is unknown.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        moved = [tuple(map(int, p.split(","))) for p in re.findall(r"(\d+,\d+)", pairs.group(1))]
        return list(next((p for p in moved if p[0] != p[1]), (0,)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, *ids = (_numbers(g) for g in iota.groups())
        return _iota(*ids).reshape(groups)[0].tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text)
    if named:
        sizes, *ids, axes = named.groups()
        names, shape = zip(*((n, int(size)) for n, size in re.findall(r"'([^']+)'=(\d+)", sizes)))
        chosen = re.findall(r"'([^']+)'", axes)
        if ":" not in axes and set(chosen) <= set(names):
            ids = (_numbers(g) for g in ids) if ids[0] else ([math.prod(shape)], None)
            return _iota(*ids).reshape(shape)[tuple(slice(None) if n in chosen else 0 for n in names)].reshape(-1).tolist()
    listed = re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", text)
    if listed:
        return _numbers(listed.group(1)) or list(range(devices))
    raise ValueError(f"a collective names its devices in an unknown way: {text[:200]}")


def _numbers(text: str | None) -> list[int] | None:
    return [int(n) for n in text.split(",")] if text else None


def _iota(dims: list[int], order: list[int] | None) -> np.ndarray:
    """0, 1, 2, ... in the shape `dims`, transposed."""
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))


def _axes(group: Iterable[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ. Partitions are numbered in row-major order of the mesh."""
    places = np.stack(np.unravel_index(list(group), tuple(mesh.values())))
    return tuple(name for name, at in zip(mesh, places) if len(set(at.tolist())) > 1)
