"""Checks of a compiled program against limits. A plan prints them; `gates` records those of the released configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from xomni_jax.planner.analysis import ProgramAnalysis
from xomni_jax.planner.chips import GIB, RESERVE, Topology

MIB = 2**20
LAYER = re.compile(r"/(adapters|language|heads|layers|blocks|double_blocks|single_blocks)/")  # in the name of an operation of a layer loop


@dataclasses.dataclass(frozen=True)
class Check:
    """One measured value of a program and its limit."""

    name: str
    found: str
    limit: str
    ok: bool


def budget(topology: Topology, reserve: float) -> float:
    """Bytes of a device that a program may use; infinite on a CPU."""
    return topology.chip.hbm * (1 - reserve) if topology.chip else math.inf


def checks(a: ProgramAnalysis, topology: Topology, reserve: float = RESERVE) -> Iterator[Check]:
    """All checks that apply to a program, the most important first."""
    yield _memory(a, budget(topology, reserve))
    if a.memory is None:
        return
    yield Check("loops understood", f"{len(a.unknown)} unknown", str(a.open_loops), len(a.unknown) <= a.open_loops)
    if a.learned:
        yield from _update(a)
    elif a.base == "rollout":
        yield from _decode(a, topology)
    elif a.forward:
        ratio = (a.flops["weights"] + a.flops["convolution"]) / a.forward
        yield Check("operations / arithmetic", f"{ratio:.3f}", "1.05", ratio <= 1.05)
    if a.base == "decoder" and a.gathered:
        sent = sum(r["sent"] for r in a.collectives)
        limit = "1.15, the MMDiT's weights gathered once a step and piece"
        yield Check("sent / weights", f"{sent / a.gathered:.3f} ({sent / GIB:.1f} GiB)", limit, sent <= 1.15 * a.gathered)


def _memory(a: ProgramAnalysis, room: float) -> Check:
    limit = "none" if math.isinf(room) else f"{room / GIB:.2f} GiB"
    return Check("memory", f"{a.fits_in / GIB:.2f} GiB", limit, a.fits_in <= room)


def _update(a: ProgramAnalysis) -> Iterator[Check]:
    ratio = (a.flops["weights"] - a.forward) / a.learned
    if a.base in ("policy-update", "sft-update", "pretrain-update"):
        yield Check("operations / 6ND, attention apart", f"{ratio:.3f}", "1.35", ratio <= 1.35)
        yield from _heads(a)
    alias = a.memory["aliased"] / a.state if a.state else 1.0
    yield Check("state updated in place", f"{alias:.1%}", "100%", alias >= 0.995)  # above 100%: tiles pad small arrays
    yield from _collectives(a)


def _heads(a: ProgramAnalysis) -> Iterator[Check]:
    positions = math.prod(a.logits[:-1]) if a.logits else 0
    if a.vocabularies:
        yield Check("positions with logits at once", f"{positions:,}", f"{a.logits_limit:,}", positions <= a.logits_limit)
    gathers = sum(r["times"] for r in a.collectives if r["kind"] == "all-gather" and "head_kernel" in r["source"])
    yield Check("head gathers", f"{gathers}", f"{a.head_gathers}, one a head", gathers <= a.head_gathers)


def _collectives(a: ProgramAnalysis) -> Iterator[Check]:
    wide = [r for r in a.collectives if r["kind"] == "all-gather" and r["dtype"] == "f32" and _one(r) > MIB and is_weight(r)]
    wide = [r for r in wide if "scatter-add" not in r["source"]]  # rows of an embedding's gradient
    yield Check("float32 weight gathers", f"{sum(r['times'] for r in wide)}", "0", not wide)
    inside = [r for r in a.collectives if r["kind"] == "all-to-all" and LAYER.search(r["source"])]
    yield Check("all-to-all in the layer loop", f"{sum(r['times'] for r in inside)}", "0", not inside)
    if a.gathered > GIB:  # in a small model, norms and biases weigh as much as its matrices
        bound = (a.gathered + a.reduced) * (a.fsdp - 1) / a.fsdp
        sent = sum(r["sent"] for r in a.collectives if is_weight(r) and _one(r) > MIB / 4)  # smaller ones are not of a weight
        yield Check("FSDP bytes / theory", f"{sent / bound:.3f} ({sent / GIB:.1f} GiB)", "1.15", sent <= 1.15 * bound)


def is_weight(row: dict) -> bool:
    """Whether a collective moves a parameter or its gradient, judged by its kind and axes."""
    return "fsdp" in row["axes"] and row["kind"] in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")


def _one(row: dict) -> float:
    return row["bytes"] / row["times"]


def _decode(a: ProgramAnalysis, topology: Topology) -> Iterator[Check]:
    ratio = a.hbm_step / a.floor
    yield Check("HBM bytes a step / (weights + cache)", f"{ratio:.3f}", "1.10", ratio <= 1.10)
    if topology.chip is None or a.cache > topology.chip.hbm / 50:  # a cache of few images is too small to compare with
        over = (a.memory["peak"] - a.memory["arguments"]) / a.cache
        yield Check("memory beside weights and cache", f"{over:.1%} of the cache", "2%", over <= 0.02)
    alias = a.memory["aliased"] / a.state
    yield Check("cache updated in place", f"{alias:.1%}", "100%", 0.995 <= alias <= 1.02)
    large = [c for c in a.copies if c["bytes"] > a.cache / 200 and c["times"] > 1]
    yield Check("copies as large as a layer's cache", f"{sum(c['times'] for c in large)}", "0", not large)
    inside = [r for r in a.collectives if r["times"] >= a.steps and "fsdp" in r["axes"] and r["kind"] == "all-gather" and _one(r) > MIB]
    yield Check("weights gathered in the decoding loop", f"{sum(r['times'] for r in inside)}", "0", not inside)
