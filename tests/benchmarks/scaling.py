"""What several devices and processes cost beyond their work: as much work for each, on simulated devices of this machine.

python -m tests.benchmarks.scaling NAME=VALUE...   one process of a measurement, as `run` starts it; prints its seconds as JSON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax

from tests.benchmarks import machine
from tests.benchmarks.faults import inline_service
from tests.benchmarks.report import OURS, Report, duration
from tests.benchmarks.timing import BenchError
from xomni_jax.core.distributed import connect, start
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.tables import aligned
from xomni_jax.training.stage import STAGES, load_config, policy_mesh

ROOT = Path(__file__).parents[2]
WARM_UPS, STEPS = 2, 5
LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4))  # processes, devices of each
# Stage -> (configuration, what one device gets).
WORK = {
    "sft": ("configs/tiny/sft.py", {"batch_size": 8, "next_token.rows": 4}),
    "grpo": ("configs/tiny/demo.py", {"batch_size": 2}),
}


class Taken(NamedTuple):
    """Medians of a step: seconds by the clock, processor seconds of all processes."""

    wall: float
    cpu: float


def run(model: str) -> Report:
    """Every layout of every stage, and its processor time beyond that of one device times their number."""
    rows, data = [("", "processes x devices", "a step", "processor time", "a device", "beyond one device's")], []
    with inline_service() as service, tempfile.TemporaryDirectory() as folder:
        for stage, (config, work) in WORK.items():
            for processes, devices in LAYOUTS:
                count = processes * devices
                words = [config, f"init_from={model}", f"run_dir={folder}/run", *(f"{key}={value * count}" for key, value in work.items())]
                words += [f"rewards.ocr.urls=('{service.url}',)", "rewards.shapes.weight=None"] if stage == "grpo" else []
                taken = measured(processes, devices, words)
                one = data[-1]["one"] if data and data[-1]["stage"] == stage else taken.cpu
                data.append({"stage": stage, "processes": processes, "devices": devices, "wall": taken.wall, "cpu": taken.cpu, "one": one})
                beyond = taken.cpu / count / one - 1
                seconds = (duration(taken.wall), duration(taken.cpu), duration(taken.cpu / count))
                rows.append((stage, f"{processes} x {devices}", *seconds, f"{beyond:+.0%}"))
    lines = [
        "scaling: each device gets the same work; the devices are simulated and share this machine's cores",
        f"{machine.describe()['processor'] or machine.describe()['system']}, {machine.cores()} cores",
        "", aligned(rows), "",
        f"Medians of {STEPS} steps after {WARM_UPS}. Processor time, of all processes, hardly depends on what else runs.",
        "Beyond one device's work are partitioning, collectives over loopback, and what is done once for each process, such as batches.",
    ]  # fmt: skip
    return Report("\n".join(lines), {"benchmark": "scaling", "rows": data, "versions": machine.versions(OURS)})


def measured(processes: int, devices: int, words: list[str]) -> Taken:
    """What a layout takes. BenchError when a process fails; repeats its last line."""
    command = [sys.executable, ROOT / "launch" / "local.py", "--processes", str(processes), "--devices", str(devices), "--"]
    done = subprocess.run([*command, sys.executable, "-m", __spec__.name, *words], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in re.findall(r"^\[\d+\] (\{.*\})$", done.stdout, re.MULTILINE)]
    if len(found) < processes:
        raise BenchError(f"{processes} x {devices} devices: {(done.stdout.strip().splitlines() or ['nothing was printed'])[-1]}")
    return Taken(max(x["wall"] for x in found), sum(x["cpu"] for x in found))


def worker(config: str, changes: list[str]) -> dict[str, Any]:
    """The steps of one process: medians of its seconds by the clock and of its processor."""
    group, cfg = start({}), load_config(ROOT / config, changes)
    mesh, took = policy_mesh(cfg), []
    with StopSignal(group) as stop, jax.set_mesh(mesh):
        connect(mesh)
        stage = STAGES.get(cfg.stage).make(cfg, mesh, stop)
        state = stage.state
        for number in range(WARM_UPS + STEPS):
            wall, cpu = time.perf_counter(), time.process_time()
            state, _ = stage.step(state, next(stage.batches), number)
            jax.block_until_ready(state)
            took.append((time.perf_counter() - wall, time.process_time() - cpu))
        stage.close()
    return dict(zip(("wall", "cpu"), map(median, zip(*took[WARM_UPS:]))))


if __name__ == "__main__":
    print(json.dumps(worker(sys.argv[1], sys.argv[2:])), flush=True)
