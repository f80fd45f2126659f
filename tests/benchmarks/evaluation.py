"""How fast an evaluation makes outputs, alone and shared by two processes, once everything is compiled; and how fast it asks a judge."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks import judging, machine
from tests.benchmarks.report import OURS, Report, duration, machine_line
from tests.benchmarks.timing import BenchError
from xomni_jax.core.tables import aligned

PROCESSES = (1, 2)
SUITES = ("rendered-text", "rendered-qa")


def run(model: str) -> Report:
    """Makes the outputs of the rendered suites with every number of processes. BenchError repeats what a failing process said."""
    others, results = machine.Others(), []
    for suite in SUITES:
        for count in PROCESSES:
            measured = _together(model, suite, count)
            items, seconds = sum(m["items"] for m in measured), max(m["seconds"] for m in measured)
            results.append({"suite": suite, "processes": count, "items": items, "seconds": seconds, "items_per_second": items / seconds})
    return report(model, results, judging.measure(), others.cores())


def report(model: str, results: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]], others: float | None) -> Report:
    """The tables and the same as JSON."""
    rows = [("", "processes", "items/s", "times one process", "items", "in")]
    alone = {r["suite"]: r["items_per_second"] for r in results if r["processes"] == 1}
    for r in results:
        speed = r["items_per_second"]
        rows.append(
            (r["suite"], str(r["processes"]), f"{speed:.3g}", f"{speed / alone[r['suite']]:.2f}", str(r["items"]), duration(r["seconds"]))
        )
    lines = [
        f"eval: outputs of the rendered suites with {model}",
        machine_line(f"{machine.cores()} cores", others),
        "",
        aligned(rows),
        "",
        "An item of rendered-text is four images, one of rendered-qa an answer. All is done once before, so nothing is compiled. Processes",
        "on one machine share its cores: two are faster only where one leaves some idle.",
        "",
        aligned([("questions to an instant judge", "sent as", "in", "CPU time of ours"), *(_judged_row(r) for r in judged)]),
        "",
        f"Twelve questions about each of {judging.ITEMS * 4} images of {judging.SIDE} x {judging.SIDE} pixels, read from PNG files.",
    ]
    data = {"benchmark": "eval", "model": model, "results": list(results), "judge": list(judged), "versions": machine.versions(OURS)}
    return Report("\n".join(lines), data | {"other_programs_cores": others, "machine": machine.describe()})


def _judged_row(result: dict[str, Any]) -> tuple[str, ...]:
    return str(result["questions"]), result["format"], duration(result["seconds"]), duration(result["cpu_seconds"])


def _together(model: str, suite: str, count: int) -> list[dict[str, float]]:
    """What `count` processes measured, each with its share of the items, begun when all were ready."""
    with ExitStack() as stack:
        started = []
        for k in range(count):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", "tests.benchmarks.evaluation", model, suite, str(k), str(count)]
            process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            stack.callback(process.kill)  # after an interruption
            started.append((process, log))
        for process, log in started:
            if process.stdout.readline() != "ready\n":
                process.wait()
                log.seek(0)
                raise BenchError(f"eval {suite} failed: {(log.read().strip().splitlines() or [f'exit code {process.returncode}'])[-1]}")
        for process, _ in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0]) for process, _ in started]


def _measure(model: str, name: str, share: tuple[int, int]) -> None:
    """One process: does its share once, says "ready", waits for a line, does it again and prints how long that took."""
    from xomni_jax.evaluation.outputs import model_opener
    from xomni_jax.evaluation.run import EvalConfig, evaluate
    from xomni_jax.evaluation.suites import get_suite
    from xomni_jax.inference import InferenceConfig

    task = get_suite(name).task
    config = lambda out: EvalConfig(name, out, phase=task, shard=share, inference=InferenceConfig(model=model))  # noqa: E731
    opened = model_opener(config(""))
    for timed in (False, True):
        with tempfile.TemporaryDirectory() as out:
            if timed:
                print("ready", flush=True)
                sys.stdin.readline()
            began = time.perf_counter()
            done = evaluate(config(out), opened)
            seconds = time.perf_counter() - began
    print(json.dumps({"items": len(done.run.mine()), "seconds": seconds}))


if __name__ == "__main__":
    _measure(sys.argv[1], sys.argv[2], (int(sys.argv[3]), int(sys.argv[4])))
