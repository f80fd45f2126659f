"""Measurements of a compiled program beside the minimum that its arithmetic requires, as plain numbers for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from xomni_jax.core import flops
from xomni_jax.core.program import Programs
from xomni_jax.planner import collectives, hlo, traffic
from xomni_jax.planner.compiled import Compiled
from xomni_jax.sharding import abstract

LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class Facts:
    """One program, per device and execution unless said otherwise.

    Attributes:
      key: of the compilation in the cache. seconds: that it took.
      memory: bytes by kind, or None where the program does not fit and the compiler asked for `needs` bytes.
      state: bytes of the donated argument. resident: of the other arrays that stay on the device while it runs.
      on_decoder_mesh: whether it runs on the decoder's own devices.
      per_step: executions in a training step. tokens, images: that one execution reads or makes.
      flops: counted over all devices, by kind. learned, forward, attention: by arithmetic, over all devices (see `core.program.Work`).
      logits: shape of the largest array of logits. logits_limit: most positions it may have. head_gathers: most gathers of output heads.
      collectives: rows of kind, axes, dtype, shape, times, bytes, sent (over all executions), source, largest first.
      gathered, reduced: bytes of weights and gradients that must be exchanged over fsdp.
      hbm: bytes moved. hbm_step: per decoding step, of `steps`; floor: the least possible. cache: bytes of the key-value cache.
      copies: copies from HBM to HBM of at least LARGE bytes. repeated: large weights that several devices hold, with the number of copies.
      loops: trip counts. unknown: loops counted once, since their trip counts could not be read. open_loops: how many there should be.
    """

    program: str
    about: str
    key: str
    seconds: float
    memory: dict[str, int] | None
    needs: int
    state: int
    persistent: int
    on_decoder_mesh: bool
    per_step: int
    tokens: int
    images: int
    devices: int
    fsdp: int
    flops: dict[str, float]
    learned: float
    forward: float
    attention: float
    logits: tuple[int, ...]
    logits_limit: int
    head_gathers: int
    collectives: list[dict[str, Any]]
    gathered: float
    reduced: float
    hbm: int
    hbm_step: float
    floor: float
    cache: float
    steps: int
    copies: list[dict[str, Any]]
    repeated: list[dict[str, Any]]
    loops: list[int]
    unknown: list[str]
    open_loops: int

    @property
    def fits_in(self) -> int:
        """Bytes that the device must have: the program's peak and the other arrays that stay on it."""
        return (self.memory["peak"] if self.memory else self.needs) + self.persistent

    @property
    def useful(self) -> float:
        """Operations that count for model FLOPs utilisation: 6ND, causal attention halved, nothing recomputed."""
        return self.learned + self.forward + self.attention


def read(name: str, made: Programs, compiled: Compiled) -> Facts:
    """Measures a compiled program.

    Raises:
      HLOError: the HLO text cannot be parsed.
    """
    program = made[name]
    where, w = made.mesh_of(program), program.work
    mesh, counted = dict(where.shape), flops.count(compiled.jaxpr)
    beside = [
        group
        for group in made.persistent
        if group not in (*program.uses, *program.freed) and program.on_decoder_mesh == (group in made.on_decoder_mesh)
    ]
    persistent = sum(abstract.bytes_per_device(made.persistent[group]) for group in beside)
    rows, moves, module = [], [], None
    if compiled.hlo is not None:
        module = hlo.parse(compiled.hlo)
        rows, moves = collectives.collectives(module, mesh), traffic.moves(module)
    step = sum(m.total for m in moves if m.times >= w.steps) / w.steps if w.steps > 1 else 0.0
    repeated = [
        row for group in program.uses if group in made.persistent for row in abstract.repeated({group: made.persistent[group]}, LARGE)
    ]
    return Facts(
        program=name, about=program.about, key=compiled.key, seconds=round(compiled.seconds, 1),
        memory=compiled.memory and dataclasses.asdict(compiled.memory), needs=compiled.needs,
        state=abstract.bytes_per_device(program.state) if program.state is not None else 0, persistent=persistent,
        on_decoder_mesh=program.on_decoder_mesh,
        per_step=program.per_step,
        tokens=w.tokens, images=w.images, devices=where.size, fsdp=mesh["fsdp"], flops=dataclasses.asdict(counted),
        learned=w.learned, forward=w.forward, attention=w.attention,
        logits=flops.widest(compiled.jaxpr, frozenset(w.vocabularies)), logits_limit=w.logits, head_gathers=w.head_gathers,
        collectives=_merged(rows), gathered=w.gathered, reduced=w.reduced,
        hbm=sum(m.total for m in moves), hbm_step=step, floor=w.hbm_per_step, cache=w.cache, steps=w.steps,
        copies=[
            dict(bytes=m.written, times=m.times, shape=str(m.instruction.result[0]), source=m.instruction.source)
            for m in sorted(traffic.copies(moves, LARGE), key=lambda m: -m.written * m.times)
        ],
        repeated=[dict(name=n, shape=s, copies=c, bytes=b) for n, s, c, b in repeated],
        loops=sorted(set(module.trips.values())) if module else [], unknown=module.unknown if module else [],
        open_loops=w.open_loops,
    )  # fmt: skip


def _merged(rows: list[collectives.Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, shape and place in the program, added up."""
    out: dict[tuple, dict[str, Any]] = {}
    for c in rows:
        row = out.setdefault(
            (c.kind, c.axes, c.dtype, c.shape, c.source),
            dict(kind=c.kind, axes=c.axes, dtype=c.dtype, shape=c.shape, source=c.source, times=0, bytes=0, sent=0.0),
        )
        row["times"] += c.times
        row["bytes"] += c.total
        row["sent"] += c.sent * c.times
    return sorted(out.values(), key=lambda r: -r["bytes"])
