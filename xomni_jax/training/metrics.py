"""Metrics of a run: JSON lines, TensorBoard, and one progress line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

# What the progress line shows of a step's metrics.
LOSSES = ("loss/total", "loss/flow", "loss/grpo", "loss/image")
SHOWN = LOSSES + ("accuracy/dense_labelled", "accuracy/answer", "reward/total/mean", "grpo/kl")


class MetricWriter:
    """RUN/metrics.jsonl (one object per logged step) and RUN/tensorboard. Only the first process writes; metrics are global."""

    def __init__(self, run_dir: str | Path, resume_step: int = 0):
        """Lines after `resume_step` belong to steps that will run again, and are dropped."""
        self._path = Path(run_dir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= resume_step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resume_step + 1)

    def _lines(self) -> list[str]:
        """Whole lines of the file; a last one cut off by a crash is left out."""
        if not self._path.is_file():
            return []
        return [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records scalars of one step; a number that is not finite is written as null."""
        if not self._writes:
            return
        finite = {name: value if np.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a uint8 [H, W, 3] image in TensorBoard."""
        if self._writes:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both."""
        if self._writes:
            self._file.close()
            self._board.close()


class Progress:
    """One line: steps, rate, time left, and the numbers one watches."""

    def __init__(self, stage: str, first: int, total: int, items_per_step: int):
        self._items = items_per_step
        self._bar = tqdm(
            total=total, initial=first, desc=stage, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.1,
            disable=jax.process_index() != 0,
        )  # fmt: skip

    def advance(self, step: int) -> None:
        """Moves to `step`."""
        self._bar.update(step - self._bar.n)

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """Moves to `step` and shows what is watched of `scalars`."""
        shown = {name.removeprefix("loss/"): f"{scalars[name]:.4g}" for name in SHOWN if name in scalars}
        rate = self._bar.format_dict.get("rate")
        if rate:
            shown["items/s"] = f"{rate * self._items:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self.advance(step)

    def say(self, text: str) -> None:
        """Prints above the line."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()
