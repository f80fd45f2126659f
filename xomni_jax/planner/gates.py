"""Compiles and checks every program of the released configurations on their slices, and writes the table of configs/xomni/README.md.

gates.json beside it holds a record of each program for every set of versions. A new record may not drift from that of the same versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xomni_jax.core.config import ConfigError
from xomni_jax.core.tables import markdown
from xomni_jax.planner import chips
from xomni_jax.planner.analysis import ProgramAnalysis
from xomni_jax.planner.check import checks
from xomni_jax.planner.chips import GIB
from xomni_jax.planner.roofline import time_of

FOLDER = Path("configs/xomni")
BEGIN, END = "<!-- gates: written by `xomni plan --gates` -->", "<!-- end of gates -->"
DRIFT = 0.02  # share by which a number may differ from the stored one of the same versions
# Numbers that must not drift.
COMPARED = ("peak", "temporaries", "aliased", "operations", "attention", "hbm", "sent")


class Gate(NamedTuple):
    """One configuration on one slice, with the overrides that this slice needs."""

    config: str
    topology: str
    overrides: tuple[str, ...] = ()


GATES = (
    Gate("grpo", "v5p-64"),
    Gate("grpo", "v6e-64"),
    # The VAE's narrowest convolution has too few channels for 64 fsdp shards.
    Gate("grpo", "v5e-256", ("mesh.data=2", "mesh.fsdp=32", "batch_size=64", "rollout.chunks=1", "accumulate=16")),
    Gate("sft", "v5p-64"),
    Gate("sft", "v6e-64"),
    Gate("sft", "v5e-256"),
)
PROGRAMS = {
    "grpo": ("policy-update", "reference", "layout", "rollout", "prefill", "decoder", "text", "vae"),
    "sft": ("sft-update",),
}


def run(cache: Path, only: str | None, reserve: float) -> Path:
    """Compiles what the cache does not hold, rewrites the records and the table after every program, and returns the table's path.

    Raises:
      ConfigError: this is not the repository's root, or no gate is on the topology `only`.
    """
    if not (FOLDER / "grpo.py").is_file():
        raise ConfigError(f"{FOLDER}: not here; run it in the repository's root")
    wanted = chips.parse(only).name if only else None
    gates = [g for g in GATES if wanted in (None, chips.parse(g.topology).name)]
    if not gates:
        raise ConfigError(f"--topology {only}: no gate is on it; they are on {', '.join(dict.fromkeys(g.topology for g in GATES))}")
    records = GateRecords(FOLDER / "gates.json")
    for gate in gates:
        for analysis in plans(gate, cache):
            records.add(gate, analysis, reserve)
            write_table(FOLDER / "README.md", records)
    for line in records.missed:
        print(line)
    return FOLDER / "README.md"


def plans(gate: Gate, cache: Path) -> Iterator[ProgramAnalysis]:
    """The analyses of all programs of a gate, one after the other."""
    topology = chips.parse(gate.topology)
    chips.prepare(topology)
    from xomni_jax.planner.plan import compile_all, programs_on
    from xomni_jax.training.stage import load_config

    made = programs_on(load_config(FOLDER / f"{gate.config}.py", gate.overrides), topology)
    yield from compile_all(made, made.programs, f"{gate.config} on {topology.name}", topology, cache)


class GateRecords:
    """The records of gates.json, {versions: {"config topology": {program: record}}}, and the checks and comparisons that a run missed."""

    def __init__(self, path: Path):
        self.path, self.missed = path, []
        self.stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, gate: Gate, a: ProgramAnalysis, reserve: float) -> None:
        """Stores the record of a program; a drift from the stored one of the same versions counts as missed."""
        from xomni_jax.checkpoint.store import write_json
        from xomni_jax.planner.compiled import versions

        topology = chips.parse(gate.topology)
        with_these = self.stored.setdefault(", ".join(f"{k} {v}" for k, v in versions(topology).items()), {})
        where, row = f"{gate.config} {gate.topology}", record(a, gate, reserve)
        place = with_these.setdefault(where, {})
        old = place.get(a.program, {})
        if old.get("key") != row["key"]:
            old = {}  # the program changed: these are its first numbers
        for name in COMPARED:
            if old.get(name) and abs(row[name] / old[name] - 1) > DRIFT:
                self.missed.append(f"{where} {a.program}: {name} drifted from {old[name]:.6g} to {row[name]:.6g} with the same versions")
        self.missed += [f"{where} {a.program}: {c['name']} is {c['found']}, limit {c['limit']}" for c in row["checks"] if not c["ok"]]
        place[a.program] = row
        write_json(self.path, self.stored)


def record(a: ProgramAnalysis, gate: Gate, reserve: float) -> dict[str, Any]:
    """The record of a program: its numbers, lower bound on time, and checks."""
    topology, m = chips.parse(gate.topology), a.memory or {}
    time = time_of(a, topology)
    return dict(
        about=a.about, key=a.key, peak=m.get("peak", a.needs), temporaries=m.get("temporaries", 0), aliased=m.get("aliased", 0),
        resident=a.persistent,
        operations=a.flops["weights"] + a.flops["convolution"], attention=a.flops["attention"] + a.flops["kernels"], hbm=a.hbm,
        sent=sum(r["sent"] for r in a.collectives), seconds=time and time.total, bound=time and time.bound,
        checks=[dict(name=c.name, found=c.found, limit=c.limit, ok=c.ok) for c in checks(a, topology, reserve)],
    )  # fmt: skip


def write_table(path: Path, records: GateRecords) -> None:
    """Replaces the text between the marks of the README."""
    text = path.read_text() if path.is_file() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(records.stored)}{END}{after}")


def table(stored: dict[str, Any]) -> str:
    """For every set of versions: the table, the checks that were missed, and the programs that are not compiled yet."""
    lines = []
    for versions, places in stored.items():
        rows = [("slice", "program", "peak GiB", "with the rest", "operations", "HBM GiB", "sent GiB", "at best", "checks")]
        missed = []
        for place, program, r in ((place, program, r) for place, programs in places.items() for program, r in programs.items()):
            bad = [c for c in r["checks"] if not c["ok"]]
            rows.append((
                place, program, f"{r['peak'] / GIB:.2f}", f"{(r['peak'] + r['resident']) / GIB:.2f}", f"{r['operations']:.3g}",
                f"{r['hbm'] / GIB:.1f}", f"{r['sent'] / GIB:.1f}", f"{r['seconds']:.3g} s, {r['bound']}" if r["seconds"] else "",
                f"{len(bad)} missed" if bad else f"{len(r['checks'])} hold",
            ))  # fmt: skip
            missed += [f"- {place}, {program}: {c['name']} {c['found']}, limit {c['limit']}" for c in bad]
        due = {f"{g.config} {g.topology}": PROGRAMS[g.config] for g in GATES}
        left = {place: [p for p in programs if p not in places.get(place, {})] for place, programs in due.items()}
        left_lines = [f"- {place}: {', '.join(programs)}" for place, programs in left.items() if programs]
        lines += [f"\nCompiled with {versions}. Memory per chip: the program's peak and, with it, everything else that stays.\n"]
        lines += [markdown(rows), "", *(["Missed:", "", *missed, ""] if missed else ["Nothing of these was missed.", ""])]
        lines += ["Not compiled yet with these versions:", "", *left_lines, ""] if left_lines else []
    return "\n".join(lines) + "\n"
