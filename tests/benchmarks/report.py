"""What a benchmark says: a table for people, the same as JSON for programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import machine
from tests.benchmarks.timing import Result
from xomni_jax.core.tables import aligned

BUSY = 0.2  # cores taken by other programs, above which times mislead
OURS = ("jax", "jaxlib", "flax")


@dataclass(frozen=True)
class Report:
    """One benchmark's outcome: `text` is printed, `data` (JSON-able) is saved."""

    text: str
    data: dict[str, Any]


def duration(seconds: float) -> str:
    """Seconds with a unit that fits: "850 us", "12.3 ms", "4.56 s"."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def machine_line(threads: str, others: float | None) -> str:
    """One line on processor, threads, and the cores that other programs took meanwhile."""
    said = machine.describe()
    text = f"{said['processor'] or said['system']}, {threads}"
    return text if others is None else f"{text}; other programs took {others:g} of {os.cpu_count()} cores"


def comparison(
    name: str,
    title: str,
    results: Sequence[Result],
    peers: Sequence[str],
    threads: tuple[int, int],
    others: float | None,
    rest: str,
) -> Report:
    """The report of a benchmark against a peer.

    Args:
      title: what was done, with its sizes.
      peers: distributions of the other side. threads: ours, theirs. others: cores that other programs took.
      rest: what, beside matrix products, takes our time (see `verdict`).
    """
    rows = [("", "ours", "peer", "peer / ours", "min to max", "by CPU time", "pairs", "our rate", "first run: ours", "peer")]
    for r in results:
        j = r.as_json()
        row = [r.case.name, duration(j["ours_seconds"]), duration(j["peer_seconds"]), f"{r.ratio:.2f}"]
        row += [f"{r.ratios.min():.2f} to {r.ratios.max():.2f}", f"{r.cpu_ratio:.2f}", str(j["pairs"])]
        row.append(f"{j['rate']['ours']:.3g} {j['rate']['unit']}")
        rows.append((*row, duration(r.first_ours_s), duration(r.first_peer_s)))
    ours, theirs = machine.versions(OURS), machine.versions(peers)
    said = [f"{k} {v}" for k, v in ours.items()], [f"{k} {v}" for k, v in theirs.items()]
    sentence = verdict(results, rest, max(threads), others)
    checks = ", ".join(f"{r.case.name} {r.difference:.1e} (limit {r.case.tolerance:g})" for r in results)
    text = "\n".join(
        [
            f"{name}: {title}",
            f"ours: {', '.join(said[0])}; peer: {', '.join(said[1])}",
            machine_line(f"threads: ours {threads[0]}, peer {threads[1]}", others),
            f"differences before timing: {checks}",
            "",
            aligned(rows),
            "",
            "Medians of interleaved pairs; above 1 ours is faster. First runs, in which ours compiles, are not part of them.",
            sentence,
        ]
    )
    data = {
        "benchmark": name,
        "title": title,
        "results": [r.as_json() for r in results],
        "versions": {"ours": ours, "peer": theirs},
        "threads": {"ours": threads[0], "peer": threads[1]},
        "other_programs_cores": others,
        "machine": machine.describe(),
        "verdict": sentence,
    }
    return Report(text, data)


def verdict(results: Sequence[Result], rest: str, threads: int = 1, others: float | None = None) -> str:
    """Where ours is slower, and whether the matrix products or the rest explain it, by the yardsticks measured beside.

    On a busy machine processor time decides. With several threads nothing does there: torch's wait for one another after every
    operation, spinning while one has lost its core, and lose many times what ours do.
    """
    by_cpu_time = others is not None and others > BUSY
    if by_cpu_time and threads > 1:
        return f"No verdict: other programs took {others:g} cores, which slows torch most. Use an idle machine, or --threads 1."
    judged = [(r, r.cpu_ratio if by_cpu_time else r.ratio) for r in results]
    cases, yardsticks = ([(r, x) for r, x in judged if r.case.yardstick is kind] for kind in (False, True))
    products = " and ".join(f"{x:.2f}" for _, x in yardsticks)
    slower, said = [(r, x) for r, x in cases if x < 1], "By CPU time, since the machine was busy: ours" if by_cpu_time else "Ours"
    if not slower:
        return (
            f"{said} is slower in no case here. Its matrix products alone have the ratio {products}; what a case gains beyond "
            "that is one compiled program against operations that the peer launches one by one: less and less as the model grows."
        )
    names = ", ".join(f"{r.case.name} ({x:.2f})" for r, x in slower)
    # The products explain a loss when they lose about as much themselves.
    if any(y < 1 and y <= 1.25 * max(x for _, x in slower) for _, y in yardsticks):
        return f"{said} is slower at {names} because XLA's matrix products are: alone, they have the ratio {products}."
    return f"{said} is slower at {names}, not for its matrix products (alone: {products}) but for the rest: {rest}."
