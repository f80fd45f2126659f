"""A lower bound on the time of a program: the slowest of its operations, its HBM traffic and its collectives, all overlapped.

It is not a prediction of speed. Peaks are the published ones. A collective over a mesh axis is assumed to use both links of one ring of
the torus; the network between slices (the replica axis) is not modelled.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from xomni_jax.planner.analysis import ProgramAnalysis
from xomni_jax.planner.chips import Topology

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


def time_of(a: ProgramAnalysis, topology: Topology) -> Time | None:
    """The time of one execution; None on a CPU, or when the program did not fit."""
    chip = topology.chip
    if chip is None or a.memory is None:
        return None
    sent = sum(row["sent"] for row in a.collectives)
    operations = sum(a.flops.values()) / a.devices / chip.flops
    return Time(operations, a.hbm / chip.bandwidth, sent / (2 * chip.link))


def mfu(a: ProgramAnalysis, seconds: float, topology: Topology) -> float:
    """Model FLOPs utilisation: the share of the peak that the useful operations reach in so many seconds."""
    return a.useful / a.devices / topology.chip.flops / seconds


def step(plan: Plan, price: float | None) -> Step | None:
    """The step made of the programs; `price` is that of one chip-hour. None where a program is missing or has no time."""
    programs = [a for a in plan.analyses if a.per_step]
    times = [time_of(a, plan.topology) for a in programs]
    if not plan.whole or any(t is None for t in times):
        return None
    seconds = [t.total * a.per_step for a, t in zip(programs, times)]
    # While a chunk of the batch is decoded, the next one is sampled.
    beside = [t.total * (a.per_step - 1) for a, t in zip(programs, times) if a.program in ("rollout", "decoder")]
    overlapped = min(beside) if any(a.on_decoder_mesh for a in programs) else 0.0
    total, chips = sum(seconds) - overlapped, plan.topology.chips
    useful = sum(a.useful * a.per_step for a in programs)
    return Step(
        tuple((a.program, s) for a, s in zip(programs, seconds)),
        overlapped,
        useful / plan.topology.size / plan.topology.chip.flops / total,
        max(a.tokens * a.per_step for a in programs) / total / chips,
        max(a.images * a.per_step for a in programs) / total * 3600,
        None if price is None else price * chips * total / 3600,
    )
