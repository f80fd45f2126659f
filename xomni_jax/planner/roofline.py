"""A lower bound on the time of a program: the slowest of its operations, its HBM traffic and its collectives, all overlapped.

It is not a prediction of speed. Peaks are the published ones. A collective over a mesh axis is assumed to use both links of one ring of
the torus; the network between slices (the replica axis) is not modelled.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from xomni_jax.planner.chips import Topology
from xomni_jax.planner.facts import Facts

if TYPE_CHECKING:
    from xomni_jax.planner.plan import Plan


@dataclasses.dataclass(frozen=True)
class Time:
    """Least seconds of one execution for each resource."""

    operations: float
    hbm: float
    collectives: float

    @property
    def total(self) -> float:
        """With everything overlapped."""
        return max(self.operations, self.hbm, self.collectives)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("operations", "hbm", "collectives"), key=lambda kind: getattr(self, kind))


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole training step.

    Attributes:
      times: (program, seconds in the step).
      overlapped: seconds in which a decoder on its own devices works beside the rollout.
      dollars: price of the step, None where none was given.
    """

    times: tuple[tuple[str, float], ...]
    overlapped: float
    mfu: float
    tokens_per_chip: float
    images_per_hour: float
    dollars: float | None

    @property
    def seconds(self) -> float:
        """Seconds of the step: all programs in turn, without what overlaps."""
        return sum(t for _, t in self.times) - self.overlapped


def time_of(facts: Facts, topology: Topology) -> Time | None:
    """The time of one execution; None on a CPU, or when the program did not fit."""
    chip = topology.chip
    if chip is None or facts.memory is None:
        return None
    sent = sum(row["sent"] for row in facts.collectives)
    operations = sum(facts.flops.values()) / facts.devices / chip.flops
    return Time(operations, facts.hbm / chip.bandwidth, sent / (2 * chip.link))


def mfu(facts: Facts, seconds: float, topology: Topology) -> float:
    """Model FLOPs utilisation: the share of the peak that the useful operations reach in so many seconds."""
    return facts.useful / facts.devices / topology.chip.flops / seconds


def step(plan: Plan, price: float | None) -> Step | None:
    """The step made of the programs; `price` is that of one chip-hour. None where a program is missing or has no time."""
    programs = [f for f in plan.facts if f.per_step]
    times = [time_of(f, plan.topology) for f in programs]
    if not plan.whole or any(t is None for t in times):
        return None
    seconds = [t.total * f.per_step for f, t in zip(programs, times)]
    # While a chunk of the batch is decoded, the next one is sampled.
    beside = [t.total * (f.per_step - 1) for f, t in zip(programs, times) if f.program in ("rollout", "decoder")]
    overlapped = min(beside) if any(f.on_decoder_mesh for f in programs) else 0.0
    total, chips = sum(seconds) - overlapped, plan.topology.chips
    useful = sum(f.useful * f.per_step for f in programs)
    return Step(
        tuple((f.program, s) for f, s in zip(programs, seconds)),
        overlapped,
        useful / plan.topology.size / plan.topology.chip.flops / total,
        max(f.tokens * f.per_step for f in programs) / total / chips,
        max(f.images * f.per_step for f in programs) / total * 3600,
        None if price is None else price * chips * total / 3600,
    )
