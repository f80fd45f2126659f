"""The report of a plan: as text for a terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.charts import bar_chart
from xomni_jax.evaluation.pages import write_page
from xomni_jax.planner.analysis import ProgramAnalysis
from xomni_jax.planner.check import checks
from xomni_jax.planner.chips import GIB
from xomni_jax.planner.plan import Plan
from xomni_jax.planner.roofline import Step, Time, mfu, step, time_of

SHOWN = 6  # rows of collectives and of replicated weights


def head(plan: Plan) -> str:
    """One line: what was planned."""
    t = plan.topology
    mesh, apart = (" x ".join(f"{axis} {n}" for axis, n in m.items() if n > 1) or "one device" for m in (plan.mesh, plan.decoder_mesh))
    mesh += f" and, for the decoder, {apart}" if plan.decoder_mesh else ""
    rented = f"{t.cloud}, {t.chips} chips" if t.chip else "simulated"
    return f"{plan.stage} on {t.name} ({rented}), mesh {mesh}; {', '.join(f'{k} {v}' for k, v in plan.versions.items())}"


def text(plan: Plan, price: float | None = None) -> str:
    """The report for a terminal."""
    lines = [head(plan), ""]
    for a in plan.analyses:
        lines += [f"{a.program}: {a.about}", *(f"  {line}" for line in program_lines(a, plan)), ""]
    return "\n".join([*lines, *proposal_lines(plan), *step_lines(step(plan, price))]).rstrip() + "\n"


def proposal_lines(plan: Plan) -> Iterator[str]:
    """For each program that does not fit: the overrides with which it would."""
    for p in plan.proposals:
        yield f"{p.program} would fit in {p.needs / GIB:.1f} GiB with {' '.join('--config.' + o for o in p.overrides)} (compiled)"
    helped = {p.program for p in plan.proposals}
    for a in plan.analyses:
        if a.fits_in > plan.room and a.program not in helped:
            yield f"{a.program} fits with none of the changes that were tried; take a larger slice"


def program_lines(a: ProgramAnalysis, plan: Plan) -> Iterator[str]:
    """Lines about a program: memory, operations, HBM, collectives, replicated weights, time, checks."""
    yield memory_line(a, plan)
    counted = ", ".join(f"{kind} {n:.4g}" for kind, n in a.flops.items() if n)
    least = a.learned + a.forward
    yield f"operations  {counted}" + (f"; by arithmetic {least:.4g} without attention" if least else "")
    if a.memory is None:
        return
    a_step = f"; {a.hbm_step / GIB:.3f} a decoding step, floor {a.floor / GIB:.3f}" if a.floor else ""
    yield f"HBM         {a.hbm / GIB:.2f} GiB moved{a_step}"
    yield from collective_lines(a)
    for row in a.repeated[:SHOWN]:
        yield f"repeated    {row['copies']} times: {row['name']} {'x'.join(map(str, row['shape']))}, {row['bytes'] / 2**20:.1f} MiB each"
    time = time_of(a, plan.topology)
    if time:
        yield time_line(a, time, plan)
    for c in checks(a, plan.topology, plan.reserve):
        yield f"{'ok    ' if c.ok else 'MISSED'}      {c.name}: {c.found}, limit {c.limit}"


def memory_line(a: ProgramAnalysis, plan: Plan) -> str:
    """Memory by kind, and whether the program fits."""
    kinds = a.memory or {}
    parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items()) or f"the compiler needs {a.needs / GIB:.1f}"
    line = f"memory GiB  {parts}; beside it {a.persistent / GIB:.2f} stay"
    if plan.topology.chip is None:
        return line
    free = (plan.room - a.fits_in) / GIB
    verdict = f"fits, {free:.2f} free" if free >= 0 else f"DOES NOT FIT, {-free:.2f} too much"
    return f"{line}; {a.fits_in / GIB:.2f} of {plan.room / GIB:.2f}: {verdict}"


def collective_lines(a: ProgramAnalysis) -> Iterator[str]:
    """Collectives by kind and axes, then the bytes of weights and gradients by arithmetic."""
    sums: dict[tuple, list[float]] = {}
    for r in a.collectives:
        row = sums.setdefault((r["kind"], tuple(r["axes"])), [0, 0.0, 0.0])
        for n, key in enumerate(("times", "bytes", "sent")):
            row[n] += r[key]
    for (kind, axes), (times, size, sent) in sorted(sums.items(), key=lambda row: -row[1][2])[:SHOWN]:
        yield f"collective  {kind} over {'+'.join(axes) or 'none'}: {times:,} times, {size / GIB:.2f} GiB, {sent / GIB:.2f} sent"
    if a.gathered:
        reduced = f", gradients reduced {a.reduced / GIB:.2f}" if a.reduced else ""
        yield f"by theory   weights gathered {a.gathered / GIB:.2f} GiB{reduced}"


def time_line(a: ProgramAnalysis, time: Time, plan: Plan) -> str:
    """The least time of one execution."""
    parts = ", ".join(f"{name} {duration(t)}" for name, t in vars(time).items())
    useful = f"; MFU at most {mfu(a, time.total, plan.topology):.0%}" if a.learned + a.forward else ""
    chips = a.devices // plan.topology.chip.devices
    rate = f", {a.tokens / time.total / chips:,.0f} tokens/s/chip" if a.tokens else ""
    return f"at best     {duration(time.total)}, bound by {time.bound} ({parts}){useful}{rate}"


def step_lines(s: Step | None) -> Iterator[str]:
    """Lines about the whole step."""
    if s is None:
        return
    parts = ", ".join(f"{name} {duration(t)}" for name, t in s.times)
    yield f"a step takes at least {duration(s.seconds)}: {parts}" + f"; {duration(s.overlapped)} of it side by side" * bool(s.overlapped)
    images = f", {s.images_per_hour:,.0f} images/hour" if s.images_per_hour else ""
    yield f"MFU at most {s.mfu:.0%}, {s.tokens_per_chip:,.0f} tokens/s/chip{images}"
    if s.dollars is not None:
        yield f"at least {s.dollars:.2f} a step at the given price per chip-hour"


def duration(seconds: float) -> str:
    """Seconds as text with three digits: 12.3 s, 45.6 ms, 0.00789 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def as_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The report as JSON-able data."""
    s, programs = step(plan, price), []
    for a in plan.analyses:
        time, held = time_of(a, plan.topology), [dataclasses.asdict(c) for c in checks(a, plan.topology, plan.reserve)]
        roofline = time and dataclasses.asdict(time) | {"total": time.total, "bound": time.bound}
        programs.append(dataclasses.asdict(a) | {"checks": held, "roofline": roofline})
    return dict(
        stage=plan.stage,
        topology=plan.topology.name,
        mesh=plan.mesh,
        decoder_mesh=plan.decoder_mesh,
        versions=plan.versions,
        reserve=plan.reserve,
        programs=programs,
        proposals=[dataclasses.asdict(p) for p in plan.proposals],
        step=s and dataclasses.asdict(s) | {"seconds": s.seconds},
    )


def write_html(path: str | Path, plan: Plan, price: float | None = None) -> Path:
    """Writes the report as one page and returns its path."""
    programs = [
        {"name": a.program, "about": a.about, "memory": memory_chart(a, plan), "lines": program_lines(a, plan)} for a in plan.analyses
    ]
    return write_page(path, "plan.html", head=head(plan), programs=programs, lines=[*proposal_lines(plan), *step_lines(step(plan, price))])


def memory_chart(a: ProgramAnalysis, plan: Plan) -> str:
    """Memory of a device against its limit; empty where there is none."""
    if a.memory is None or plan.topology.chip is None:
        return ""
    parts = {"the program": a.memory["peak"] / GIB, "other arrays": a.persistent / GIB}
    return bar_chart(f"Memory of {a.program}", parts, plan.room / GIB, "GiB per device")
