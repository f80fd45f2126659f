"""How fast an evaluation makes outputs, in one process and shared by two: whole commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from xomni_jax.benchmarks import machine
from xomni_jax.benchmarks.report import OURS, Report, duration, machine_line, table
from xomni_jax.benchmarks.timing import BenchError

PROCESSES = (1, 2)
SUITES = {"rendered-text": "generate", "rendered-qa": "answer"}


def run(model: str) -> Report:
    """Makes the outputs of the rendered suites with every number of processes. BenchError repeats what a failing command said."""
    others, results = machine.Others(), []
    for suite, phase in SUITES.items():
        for count in PROCESSES:
            with tempfile.TemporaryDirectory() as out:
                _outputs(model, suite, phase, count, out)
                results.append({"suite": suite, "processes": count, **rate(_times(Path(out)))})
    return report(model, results, others.cores())


def rate(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Items per second while all processes were at work: from the last one's first finished batch to the first one's last.

    Args:
      times: per process, when its items were finished, in seconds. What is finished before counts as starting up: programs are compiled.

    Raises:
      BenchError: the processes were not at work at the same time.
    """
    began, ended = max(t[0] for t in times), min(t[-1] for t in times)
    items = sum(began < x <= ended for t in times for x in t)
    if not items:
        raise BenchError("the processes were not at work at the same time; try again on a machine with less to do")
    return {"items_per_second": items / (ended - began), "items": items, "seconds": ended - began}


def report(model: str, results: Sequence[dict[str, Any]], others: float | None) -> Report:
    """The table and the same as JSON."""
    rows = [("", "processes", "items/s", "times one process", "items", "in")]
    alone = {r["suite"]: r["items_per_second"] for r in results if r["processes"] == 1}
    for r in results:
        speed = r["items_per_second"]
        rows.append((r["suite"], str(r["processes"]), f"{speed:.3g}", f"{speed / alone[r['suite']]:.2f}", str(r["items"]), duration(r["seconds"])))
    lines = [f"eval: outputs of the rendered suites with {model}; an item of rendered-text is four pictures, one of rendered-qa an answer"]
    lines += [machine_line(f"{machine.cores()} cores", others), "", table(rows), ""]
    lines += ["Without start and first batch, in which programs are compiled. Processes on one machine share its cores: two are faster only",
              "where one leaves some idle."]  # fmt: skip
    data = {"benchmark": "eval", "model": model, "results": list(results), "versions": machine.versions(OURS)}
    return Report("\n".join(lines), data | {"other_programs_cores": others, "machine": machine.describe()})


def _outputs(model: str, suite: str, phase: str, count: int, out: str) -> None:
    """Runs one command per process, all at once."""
    command = [sys.executable, "-m", "xomni_jax.cli.main", "eval", suite, "--phase", phase, "--model", model, "--out", out]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        shares = [[*command, "--shard", f"{k + 1}/{count}"] for k in range(count)]
        started = [subprocess.Popen(c, stdout=log, stderr=log) for c, log in zip(shares, logs)]
        try:
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()  # after an interruption
        for code, log in zip(codes, logs):
            if code:
                log.seek(0)
                raise BenchError(f"eval {suite} failed: {(log.read().strip().splitlines() or [f'exit code {code}'])[-1]}")


def _times(out: Path) -> list[list[float]]:
    return [[json.loads(line)["at"] for line in path.read_text().splitlines()] for path in sorted((out / "parts").glob("*.jsonl"))]
