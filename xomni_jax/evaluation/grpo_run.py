"""Reads a training run: its curves, and of a GRPO run the reward weights and the times of a step's parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.evaluation.suite import SuiteError

STEP_PARTS = {"rollout": "perf/rollout_s", "decode": "perf/decode_s", "reward": "perf/reward_wait_s", "update": "perf/update_s"}


@dataclass(frozen=True)
class GRPORun:
    """A training run.

    Attributes:
      records: one dict per logged step.
      config: the resolved configuration, {} when the run kept none.
    """

    records: tuple[dict[str, Any], ...]
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return max(int(r["step"]) for r in self.records)

    @property
    def weights(self) -> dict[str, float]:
        """Reward -> weight of those used in training; OCR and shapes with equal weights when the run has no configuration."""
        stored = self.config.get("rewards", {"ocr": {"weight": 1.0}, "shapes": {"weight": 1.0}})
        return {name: float(reward["weight"]) for name, reward in stored.items() if reward.get("weight")}

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one metric where it was logged."""
        pairs = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), (int, float))]
        return (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float64))

    def step_seconds(self) -> dict[str, float | None]:
        """Median seconds per step in each part; "reward" is the time waited after sampling, since scoring overlaps it."""
        return {part: float(np.median(values)) if len(values := self.curve(name)[1]) else None for part, name in STEP_PARTS.items()}


def read_run(directory: str | Path) -> GRPORun:
    """Reads RUN/metrics.jsonl and RUN/config.json.

    Raises:
      SuiteError: there is no run here, or none of its lines can be read.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise SuiteError(f"{directory}: no metrics.jsonl here; give the run directory of the GRPO stage, such as runs/demo/grpo")
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    if not records:
        raise SuiteError(f"{path}: no step was logged; let the run make at least one step")
    config = path.with_name("config.json")
    try:
        return GRPORun(tuple(records), json.loads(config.read_text()) if config.is_file() else {})
    except ValueError as error:
        raise SuiteError(f"{config}: not readable as JSON ({error}); restore it from the run that wrote it") from None
