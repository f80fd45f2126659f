"""Measurements of a compiled program beside the minimum that its arithmetic requires, as plain numbers for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from xomni_jax.core import flops
from xomni_jax.core.program import Programs, Work
from xomni_jax.planner import collectives, hlo, traffic
from xomni_jax.planner.compiled import Compiled
from xomni_jax.sharding import abstract

LARGE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramAnalysis(Work):
    """A program's minimal work (over all devices), and what was measured of one execution (per device unless said otherwise).

    Attributes:
      key: of the compilation in the cache. seconds: that it took.
      memory: bytes by kind, or None where the program does not fit and the compiler asked for `needs` bytes.
      state: bytes of the donated argument. persistent: of other arrays that stay on the device while it runs.
      on_decoder_mesh: whether it runs on the decoder's own devices.
      per_step: executions in a training step.
      flops: counted over all devices, by kind.
      logits: shape of the largest array of logits.
      collectives: rows of kind, axes, dtype, shape, times, bytes, sent (over all executions), source, largest first.
      hbm: bytes moved. hbm_step: bytes moved in each decoding step.
      copies: copies from HBM to HBM of at least LARGE bytes. repeated: large weights that several devices hold, with the number of copies.
      loops: trip counts. unknown: loops whose trip counts could not be read; they are counted once.
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
    devices: int
    fsdp: int
    flops: dict[str, float]
    logits: tuple[int, ...]
    collectives: list[dict[str, Any]]
    hbm: int
    hbm_step: float
    copies: list[dict[str, Any]]
    repeated: list[dict[str, Any]]
    loops: list[int]
    unknown: list[str]

    @property
    def base(self) -> str:
        """The program's name without its image size."""
        return self.program.partition("@")[0]

    @property
    def fits_in(self) -> int:
        """Bytes that the device must have: the program's peak and the other arrays that stay on it."""
        return (self.memory["peak"] if self.memory else self.needs) + self.persistent

    @property
    def useful(self) -> float:
        """Operations that count for model FLOPs utilisation: 6ND, causal attention halved, nothing recomputed."""
        return self.learned + self.forward + self.attention


def analyse(name: str, made: Programs, compiled: Compiled) -> ProgramAnalysis:
    """Measures a compiled program."""
    program = made[name]
    mesh, steps = made.mesh_of(program), program.work.steps
    beside = [
        arrays
        for group, arrays in made.persistent.items()
        if group not in (*program.uses, *program.freed) and program.on_decoder_mesh == (group in made.on_decoder_mesh)
    ]
    used = [{group: made.persistent[group]} for group in program.uses if group in made.persistent]
    rows, moves, module = [], [], None
    if compiled.hlo is not None:
        module = hlo.parse(compiled.hlo)
        rows, moves = collectives.collectives(module, dict(mesh.shape)), traffic.moves(module)
    copies = sorted(traffic.copies(moves, LARGE), key=lambda m: -m.written * m.times)
    return ProgramAnalysis(
        **vars(program.work), program=name, about=program.about, per_step=program.per_step, on_decoder_mesh=program.on_decoder_mesh,
        key=compiled.key, seconds=round(compiled.seconds, 1), memory=compiled.memory, needs=compiled.needs,
        state=abstract.bytes_per_device(program.state), persistent=abstract.bytes_per_device(beside),
        devices=mesh.size, fsdp=mesh.shape["fsdp"],
        flops=dataclasses.asdict(flops.count(compiled.jaxpr)),
        logits=flops.widest(compiled.jaxpr, frozenset(program.work.vocabularies)),
        collectives=_merged(rows),
        hbm=sum(m.total for m in moves),
        hbm_step=sum(m.total for m in moves if m.times >= steps) / steps if steps > 1 else 0.0,
        copies=[
            dict(bytes=m.written, times=m.times, shape=str(m.instruction.result[0]), source=m.instruction.source) for m in copies
        ],
        repeated=[dict(name=n, shape=s, copies=c, bytes=b) for group in used for n, s, c, b in abstract.repeated(group, LARGE)],
        loops=sorted(set(module.trips.values())) if module else [],
        unknown=module.unknown if module else [],
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
