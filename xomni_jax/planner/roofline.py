"""The least time a role can take on a chip: the slowest of its operations, its HBM traffic and its collectives, all overlapped.

Not a prediction of speed: compilers and chips fall short of it. Peaks are the published ones. A collective over a mesh axis is given both links
of one ring of the torus; a replica axis between slices is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xomni_jax.planner.chips import Topology
from xomni_jax.planner.facts import Facts

TRAINING = ("policy-update", "sft-update", "pretrain-update", "tokenizer-update", "decoder-update")


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one execution by what bounds it."""

    operations: float
    hbm: float
    collectives: float

    @property
    def total(self) -> float:
        """Everything overlapped."""
        return max(self.operations, self.hbm, self.collectives)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("operations", "hbm", "collectives"), key=lambda kind: getattr(self, kind))


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole training step: `times` are (role, seconds in the step)."""

    times: tuple[tuple[str, float], ...]
    mfu: float
    tokens_per_chip: float
    images_per_hour: float
    dollars: float | None

    @property
    def seconds(self) -> float:
        """Of all roles, one after the other."""
        return sum(t for _, t in self.times)


def time_of(facts: Facts, topology: Topology) -> Time | None:
    """None where there is nothing to divide by: on a CPU, or when the role was not compiled."""
    chip = topology.chip
    if chip is None or facts.memory is None:
        return None
    sent = sum(row["sent"] for row in facts.collectives)
    operations = sum(facts.flops.values()) / facts.devices / chip.flops
    return Time(operations, facts.hbm / chip.bandwidth, sent / (2 * chip.link))


def mfu(facts: Facts, seconds: float, topology: Topology) -> float:
    """Share of the peak that useful operations (6ND, causal attention halved, nothing recomputed) reach in so many seconds."""
    useful = facts.learned + facts.forward + facts.attention
    return useful / facts.devices / topology.chip.flops / seconds


def step(all_facts: Sequence[Facts], topology: Topology, price: float | None) -> Step | None:
    """The step that the roles make up; `price` is of one chip-hour. None when one of them has no time."""
    roles = [f for f in all_facts if f.per_step]
    times = [time_of(f, topology) for f in roles]
    if not roles or any(t is None for t in times):
        return None
    seconds = [t.total * f.per_step for f, t in zip(roles, times)]
    useful = sum((f.learned + f.forward + f.attention) * f.per_step for f in roles)
    last = roles[0]
    images = sum(f.images * f.per_step for f in roles if f.role == "decoder") or last.images
    total = sum(seconds)
    return Step(
        tuple((f.role, s) for f, s in zip(roles, seconds)),
        useful / last.devices / topology.chip.flops / total,
        last.tokens / total / topology.chips,
        images / total * 3600,
        None if price is None else price * topology.chips * total / 3600,
    )
