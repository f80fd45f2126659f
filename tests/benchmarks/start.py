"""How long a command takes from its start to its first result: with an empty cache of programs, and with a filled one."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, machine_line
from tests.benchmarks.timing import BenchError
from xomni_jax.core.tables import aligned

ROOT = Path(__file__).parents[2]
SIGNS = ('a green sign that says "OPEN"', 'a red sign that says "HELLO"', 'a blue sign that says "TEA"')
# (row, seconds wanted or None). Rows run in this order and share one cache: what a row compiles, the next ones find.
ROWS = (
    ("imports alone", None),
    ("generate, cold", 5.0),
    ("generate, warm", 2.5),
    ("generate, 3 prompts, new", None),
    ("generate, 4 prompts, warm", 2.5),
    ("train, cold", None),
    ("train, warm", None),
)


def run(model: str) -> Report:
    """`xomni generate` to its images and `xomni train` to the end of its first step, each in a process of its own.

    Raises:
      BenchError: a command failed.
    """
    others, rows = machine.Others(), []
    with tempfile.TemporaryDirectory(prefix="xomni-bench-start-") as folder:
        for name, wanted in ROWS:
            rows.append({"name": name, "wanted": wanted, **measure(command(name, model, folder), Path(folder) / "cache")})
    table = [("", "seconds", "CPU seconds", "programs compiled", "wanted")]
    for r in rows:
        wanted = "" if r["wanted"] is None else f"{r['wanted']:g} s: {'reached' if r['seconds'] <= r['wanted'] else 'MISSED'}"
        table.append((r["name"], f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", str(r["compiled"]), wanted))
    text = "\n".join(["start: from the command to its first result", machine_line("all cores", others.cores()), "", aligned(table)])
    data = {"benchmark": "start", "rows": rows, "versions": machine.versions(OURS), "machine": machine.describe()}
    return Report(text, data)


def command(name: str, model: str, folder: str) -> list[str]:
    """The command line of a row."""
    if name == "imports alone":
        return [sys.executable, "-c", "import xomni_jax.inference"]
    xomni = [sys.executable, "-m", "xomni_jax.cli.main"]
    if name.startswith("train"):
        config = [f"--config={ROOT}/configs/tiny/sft.py", "--config.steps=1", f"--config.init_from={model}"]
        return [*xomni, "train", *config, f"--config.run_dir={folder}/{name.replace(', ', '_')}"]
    prompts = {"generate, 3 prompts, new": SIGNS, "generate, 4 prompts, warm": (*SIGNS, SIGNS[0])}.get(name, SIGNS[:1])
    return [*xomni, "generate", *prompts, "--model", model, "--out", f"{folder}/images"]


def measure(line: Sequence[str], cache: Path) -> dict[str, Any]:
    """Runs a command with the cache of programs in a folder; its time, its processor time, and how many programs it added."""
    before, began, known = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), programs(cache)
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BenchError(f"{' '.join(line[1:5])} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "compiled": programs(cache) - known}


def programs(cache: Path) -> int:
    """Compiled programs in a cache of JAX."""
    return len(list(cache.glob("*-cache")))
