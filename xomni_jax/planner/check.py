"""Checks of a compiled program against limits. A plan prints them; `gates` records those of the released configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from xomni_jax.planner.chips import GIB, RESERVE, Topology
from xomni_jax.planner.facts import Facts

MIB = 2**20
LAYER = re.compile(r"/(adapters|language|heads|layers|blocks|double_blocks|single_blocks)/")  # in the name of an operation of a layer loop


@dataclasses.dataclass(frozen=True)
class Check:
    """One measured value of a program and its limit."""

    name: str
    found: str
    limit: str
    ok: bool


def budget(topology: Topology, reserve: float = RESERVE) -> float:
    """Bytes of a device that a program may use; infinite on a CPU."""
    return topology.chip.hbm * (1 - reserve) if topology.chip else math.inf


def checks(f: Facts, topology: Topology, reserve: float = RESERVE) -> Iterator[Check]:
    """All checks that apply to a program, the most important first."""
    yield _memory(f, budget(topology, reserve))
    if f.memory is None:
        return
    yield Check("loops understood", f"{len(f.unknown)} unknown", str(f.open_loops), len(f.unknown) <= f.open_loops)
    if f.learned:
        yield from _update(f)
    elif f.program == "rollout":
        yield from _decode(f, topology)
    elif f.forward:
        ratio = (f.flops["weights"] + f.flops["convolution"]) / f.forward
        yield Check("operations / arithmetic", f"{ratio:.3f}", "1.05", ratio <= 1.05)
    if f.program == "decoder" and f.gathered:
        sent = sum(r["sent"] for r in f.collectives)
        limit = "1.15, the MMDiT's weights gathered once a step and piece"
        yield Check("sent / weights", f"{sent / f.gathered:.3f} ({sent / GIB:.1f} GiB)", limit, sent <= 1.15 * f.gathered)


def _memory(f: Facts, room: float) -> Check:
    limit = "none" if math.isinf(room) else f"{room / GIB:.2f} GiB"
    return Check("memory", f"{f.fits_in / GIB:.2f} GiB", limit, f.fits_in <= room)


def _update(f: Facts) -> Iterator[Check]:
    ratio = (f.flops["weights"] - f.forward) / f.learned
    if f.program in ("policy-update", "sft-update", "pretrain-update"):
        yield Check("operations / 6ND, attention apart", f"{ratio:.3f}", "1.35", ratio <= 1.35)
        yield from _heads(f)
    alias = f.memory["aliased"] / f.state if f.state else 1.0
    yield Check("state updated in place", f"{alias:.1%}", "100%", 0.995 <= alias <= 1.02)
    yield from _collectives(f)


def _heads(f: Facts) -> Iterator[Check]:
    positions = math.prod(f.logits[:-1]) if f.logits else 0
    yield Check("positions with logits at once", f"{positions:,}", f"{f.logits_limit:,}", positions <= f.logits_limit)
    gathers = sum(r["times"] for r in f.collectives if r["kind"] == "all-gather" and "head_kernel" in r["source"])
    yield Check("head gathers", f"{gathers}", f"{f.head_gathers}, one a head", gathers <= f.head_gathers)


def _collectives(f: Facts) -> Iterator[Check]:
    wide = [r for r in f.collectives if r["kind"] == "all-gather" and r["dtype"] == "f32" and _one(r) > MIB and is_weight(r)]
    wide = [r for r in wide if "scatter-add" not in r["source"]]  # rows of an embedding's gradient
    yield Check("float32 weight gathers", f"{sum(r['times'] for r in wide)}", "0", not wide)
    inside = [r for r in f.collectives if r["kind"] == "all-to-all" and LAYER.search(r["source"])]
    yield Check("all-to-all in the layer loop", f"{sum(r['times'] for r in inside)}", "0", not inside)
    if f.gathered:
        bound = (f.gathered + f.reduced) * (f.fsdp - 1) / f.fsdp
        sent = sum(r["sent"] for r in f.collectives if is_weight(r) and _one(r) > MIB / 4)  # smaller ones are not of a weight
        yield Check("FSDP bytes / theory", f"{sent / bound:.3f} ({sent / GIB:.1f} GiB)", "1.15", sent <= 1.15 * bound)


def is_weight(row: dict) -> bool:
    """Whether a collective moves a parameter or its gradient, judged by its kind and axes."""
    return "fsdp" in row["axes"] and row["kind"] in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")


def _one(row: dict) -> float:
    return row["bytes"] / row["times"]


def _decode(f: Facts, topology: Topology) -> Iterator[Check]:
    ratio = f.hbm_step / f.floor
    yield Check("HBM bytes a step / (weights + cache)", f"{ratio:.3f}", "1.10", ratio <= 1.10)
    if topology.chip is None or f.cache > topology.chip.hbm / 50:  # a cache of few images is too small to compare with
        over = (f.memory["peak"] - f.memory["arguments"]) / f.cache
        yield Check("memory beside weights and cache", f"{over:.1%} of the cache", "2%", over <= 0.02)
    alias = f.memory["aliased"] / f.state
    yield Check("cache updated in place", f"{alias:.1%}", "100%", 0.995 <= alias <= 1.02)
    large = [c for c in f.copies if c["bytes"] > f.cache / 200 and c["times"] > 1]
    yield Check("copies as large as a layer's cache", f"{sum(c['times'] for c in large)}", "0", not large)
    inside = [r for r in f.collectives if r["times"] >= f.steps and "fsdp" in r["axes"] and r["kind"] == "all-gather" and _one(r) > MIB]
    yield Check("weights gathered in the decoding loop", f"{sum(r['times'] for r in inside)}", "0", not inside)
