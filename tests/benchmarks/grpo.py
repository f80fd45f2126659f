"""Where the seconds of a GRPO step go, with real reward services, and how much scoring hides behind sampling and decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, duration, machine_line
from tests.benchmarks.services import running
from tests.benchmarks.timing import BenchError
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.tables import aligned
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rl import grpo
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.stage import RunningStage

DEMO = Path(__file__).parents[2] / "configs" / "tiny" / "demo.py"
WORKERS = {"ocr": 2}  # as in the demo; one for every other service
PARTS = {"rollout": "perf/rollout_s", "decode": "perf/decode_s", "reward": "perf/reward_wait_s", "update": "perf/update_s"}
WARM_UPS = 2
MIN_STEPS = 3


class Trainer:
    """A GRPO stage that is stepped by hand."""

    def __init__(self, config: grpo.GRPORun, mesh: jax.sharding.Mesh):
        # The signal is never entered: Ctrl-C ends a benchmark at once, there is nothing to save.
        self.stage: RunningStage = grpo.GRPOStage.make(config, mesh, StopSignal())
        self.state, self.number, self.metrics = self.stage.state, 0, dict[str, Any]()

    def step(self) -> dict[str, float]:
        """One step: seconds of each part, of the whole, and of the rest between the parts."""
        batch = next(self.stage.batches)  # drawn ahead by the data set's own thread
        began = time.perf_counter()
        self.state, metrics = self.stage.step(self.state, batch, self.number)
        jax.block_until_ready(self.state)
        whole = time.perf_counter() - began
        self.number, self.metrics = self.number + 1, metrics
        seconds = {part: float(metrics[name]) for part, name in PARTS.items()}
        return seconds | {"other": whole - sum(seconds.values()), "step": whole}


def run(config: grpo.GRPORun, repeats: int, seconds: float) -> Report:
    """Steps two trainers in turn: as configured, and with `rollout.chunks=1`, where all is scored after all is drawn.

    What the second one waits is what scoring takes; what the first one waits is what of it could not be hidden.

    Raises:
      BenchError: the configuration asks no reward, or its batch is not divided into chunks.
    """
    names = [name for name, reward in config.rewards.items() if reward.weight is not None]
    if not names:
        raise BenchError("config.rewards: every weight is None; give at least one reward a weight")
    if config.rollout.chunks < 2:
        raise BenchError(f"config.rollout.chunks={config.rollout.chunks} leaves nothing to overlap; set it to 2 or more")
    before = machine.load()
    with running({name: WORKERS.get(name, 1) for name in names}) as urls:
        clients = {name: RewardClient(name, url) for name, url in urls.items()}
        asked = {name: dataclasses.replace(config.rewards[name], urls=(url,)) for name, url in urls.items()}
        config = dataclasses.replace(config, rewards=dict(config.rewards) | asked)
        serial = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, chunks=1))
        mesh = make_mesh(config.mesh.sizes())
        with jax.set_mesh(mesh):
            trainers = {kind: Trainer(c, mesh) for kind, c in {"overlapped": config, "serial": serial}.items()}
            began = time.perf_counter()
            for _ in range(WARM_UPS):
                for trainer in trainers.values():
                    trainer.step()
            warm_s, busy = time.perf_counter() - began, dict.fromkeys(names, 0.0)
            steps, end = {kind: [] for kind in trainers}, time.perf_counter() + seconds
            while len(steps["serial"]) < repeats and (len(steps["serial"]) < MIN_STEPS or time.perf_counter() < end):
                said = {name: _busy(client) for name, client in clients.items()}
                steps["overlapped"].append(trainers["overlapped"].step())
                busy = {name: busy[name] + _busy(client) - said[name] for name, client in clients.items()}
                steps["serial"].append(trainers["serial"].step())
        for closing in (*clients.values(), *(trainer.stage for trainer in trainers.values())):
            closing.close()
    n = len(steps["serial"])
    return report(config, steps, {name: s / n for name, s in busy.items()}, warm_s, (before, machine.load()))


def _busy(client: RewardClient) -> float:
    return client.health()[0].busy_seconds


def summary(steps: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Seconds per part of both trainers (medians over steps), the share of each part, the scoring and what of it is hidden."""

    def over_steps(kind: str, average: Callable[[list[float]], Any]) -> dict[str, float]:
        return {part: float(average([s[part] for s in steps[kind]])) for part in steps[kind][0]}

    medians = {kind: over_steps(kind, np.median) for kind in steps}
    scoring, waited = medians["serial"]["reward"], medians["overlapped"]["reward"]
    pairs = np.array([b["step"] / a["step"] for a, b in zip(steps["overlapped"], steps["serial"], strict=True)])
    mean = over_steps("overlapped", np.mean)
    return {
        "step_seconds": medians["overlapped"],
        "serial_step_seconds": medians["serial"],
        "shares": {part: value / mean["step"] for part, value in mean.items() if part != "step"},  # of the means: they sum to one
        "overlap": {
            "scoring_seconds": scoring,
            "waited_seconds": waited,
            "hidden_share": max(0.0, 1.0 - waited / scoring) if scoring else 0.0,
        },
        "serial_over_overlapped": {"median": float(np.median(pairs)), "min": float(pairs.min()), "max": float(pairs.max())},
    }


def report(
    config: grpo.GRPORun,
    steps: Mapping[str, list[dict[str, float]]],
    busy: Mapping[str, float],
    warm_s: float,
    loads: tuple[float | None, float | None],
) -> Report:
    """Table and JSON of measured steps; `busy`: seconds per step that requests spent in each service, queueing included."""
    s, workers = summary(steps), {name: WORKERS.get(name, 1) for name in busy}
    rows = [("", f"{config.rollout.chunks} chunks", "share", "1 chunk (serial)")]
    for part in (*PARTS, "other", "step"):
        share = f"{s['shares'][part]:.0%}" if part in s["shares"] else ""
        rows.append((part, duration(s["step_seconds"][part]), share, duration(s["serial_step_seconds"][part])))
    o, gain, n = s["overlap"], s["serial_over_overlapped"], len(steps["serial"])
    rollouts = config.batch_size * config.grpo.rollouts_per_prompt
    height, width = config.data.sizes[0]
    title = f"{config.batch_size} prompts x {config.grpo.rollouts_per_prompt} rollouts of {height}x{width} pixels"
    versions = machine.versions((*OURS, "rapidocr", "onnxruntime"))
    threads = f"threads: trainer {machine.xla_threads()}, " + ", ".join(f"{name} {count}" for name, count in workers.items())
    verdict = _verdict(s, machine.cores())
    lines = [
        f"grpo: one step of {title}, model {config.init_from}",
        ", ".join(f"{k} {v}" for k, v in versions.items()),
        machine_line(threads, None) + ("" if None in loads else f"; load {loads[0]:g} before and {loads[1]:g} after"),
        "",
        aligned(rows),
        "",
        f"Medians of {n} steps of each kind, in turn: {rollouts / s['step_seconds']['step']:.3g} rollouts/s; "
        "reward is what the trainer waits.",
        f"The first {WARM_UPS} steps of each, with compilation, took {duration(warm_s)} and are not counted.",
        f"Overlap: scoring takes {duration(o['scoring_seconds'])} after all is drawn, and when overlapped the trainer waits "
        f"{duration(o['waited_seconds'])}: {o['hidden_share']:.0%} is hidden.",
        "Seconds a step with requests under way: " + ", ".join(f"{name} {duration(value)}" for name, value in busy.items()) + ".",
        f"Step time serial / overlapped: {gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f}).",
        verdict,
    ]  # fmt: skip
    data = {
        "benchmark": "grpo",
        "title": title,
        "model": str(config.init_from),
        "steps": n,
        "rollouts": rollouts,
        "chunks": config.rollout.chunks,
        **s,
        "service_request_seconds": dict(busy),
        "first_steps_seconds": warm_s,
        "versions": versions,
        "threads": {"trainer": machine.xla_threads(), "services": workers},
        "load": {"before": loads[0], "after": loads[1]},
        "machine": machine.describe(),
        "verdict": verdict,
        "all_steps": {kind: list(taken) for kind, taken in steps.items()},
    }
    return Report("\n".join(lines), data)


def _verdict(s: Mapping[str, Any], cores: int) -> str:
    slowest = max(PARTS, key=lambda part: s["shares"][part])
    gain = s["serial_over_overlapped"]["median"]
    said = f"The largest part of a step is {slowest} ({s['shares'][slowest]:.0%}). "
    said += f"Overlapping makes it {gain:.2f} times as fast" if gain > 1 else f"Overlapping does not shorten it here ({gain:.2f})"
    return f"{said}: trainer and services share {cores} cores, so scoring in the background slows what it hides behind."
