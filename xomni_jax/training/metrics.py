"""Metrics and images of a run: files, TensorBoard, Weights & Biases, and the progress shown."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from xomni_jax.core.config import ConfigError
from xomni_jax.core.distributed import gather_json
from xomni_jax.training.operations import say
from xomni_jax.training.stage import Grid

# Metrics that the progress shows.
SHOWN = (
    "loss/total", "validation/loss/total", "loss/flow", "loss/grpo", "loss/image", "accuracy/dense_labelled", "accuracy/answer",
    "reward/total/mean", "grpo/kl",
)  # fmt: skip


class MetricWriter:
    """Writes RUN/metrics.jsonl, one object per logged step, RUN/images, RUN/tensorboard, and to a project of Weights & Biases.

    A context; only process 0 writes, since metrics are global.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0, project: str = ""):
        """Drops the lines after `resume_step`, whose steps will run again."""
        self._dir, self._writes = Path(run_dir), jax.process_index() == 0
        if not self._writes:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        drop_after(self._dir / "metrics.jsonl", resume_step)
        self._wandb = open_wandb(project, self._dir) if project else None
        self._file = (self._dir / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of one step. In the JSON a number that is not finite becomes null."""
        if not self._writes:
            return
        finite = {name: value if np.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(scalars), step=step)

    def grid(self, step: int, grid: Grid) -> None:
        """Records images as RUN/images/step_N.png, and the texts that belong to them as lines of step_N.jsonl."""
        if not self._writes:
            return
        image, path = grid.image(), self._dir / "images" / f"step_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        notes = "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in grid.notes())
        path.with_suffix(".jsonl").write_text(notes, encoding="utf-8")
        self._board.add_image("samples", image, step, dataformats="HWC")
        self._board.add_text("samples", textwrap.indent(notes, "    "), step)  # as it is, by the rules of Markdown
        if self._wandb:
            import wandb

            self._wandb.log({"samples": wandb.Image(image, caption=notes)}, step=step)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._writes:
            self._file.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(error is not None))


def check_wandb(project: str) -> None:
    """ConfigError where the package of Weights & Biases is not installed, or has no account to send metrics to."""
    try:
        import wandb
    except ImportError:
        remedy = "pip install 'xomni_jax[wandb]' brings it, or leave config.wandb empty"
        raise ConfigError(f"config.wandb={project}: the package wandb is not installed; {remedy}") from None
    try:
        ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False)
    except wandb.Error as e:
        raise ConfigError(f"config.wandb={project}: {e}") from e
    if not ready:
        raise ConfigError(f"config.wandb={project}: no login; run wandb login, or set WANDB_MODE=offline to keep everything in RUN/wandb")


def open_wandb(project: str, run_dir: Path) -> Any:
    """The run of Weights & Biases that belongs to a run directory. RUN/wandb_id has its id, under which a resumed run continues."""
    import wandb

    path, config = run_dir / "wandb_id", json.loads((run_dir / "config.json").read_text())
    known = path.read_text() if path.is_file() else None
    try:
        run = wandb.init(project=project, id=known, resume="allow", name=run_dir.name, dir=run_dir, config=config)
    except wandb.Error as e:
        why = f"config.wandb={project}: {e}; the same command goes on, WANDB_MODE=offline keeps everything in RUN/wandb"
        raise ConfigError(why) from e
    path.write_text(run.id)
    return run


def drop_after(path: Path, step: int) -> None:
    """Drops the lines of a file of JSON lines that belong to later steps, and a last one that a crash cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    part = path.with_suffix(".part")
    part.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step))
    part.replace(path)


class SkippedSteps:
    """The steps that `training.guard` skipped, with the ids of their examples: RUN/skipped.jsonl, which exists once there is one.

    What a step's metrics say is read only when they are written anyway, so that the host never waits for a step.
    """

    def __init__(self, run_dir: Path, count: int, resume_step: int):
        """`count`: steps skipped up to `resume_step`."""
        self.path, self._count, self._notes = run_dir / "skipped.jsonl", count, list[tuple[int, Any, Any]]()
        if self.path.is_file() and jax.process_index() == 0:
            drop_after(self.path, resume_step)

    def note(self, step: int, ids: Sequence[str], metrics: Mapping[str, Any]) -> None:
        """Keeps the ids of this process's examples of a step until it is known whether the step was skipped."""
        if "guard/skipped" in metrics:
            self._notes.append((step, list(ids), (metrics["guard/skipped"], metrics["optim/grad_norm"])))

    def write(self) -> list[str]:
        """Adds the steps skipped since the last call to the file; returns a line to print for each."""
        notes, self._notes, lines = self._notes, [], []
        for step, ids, values in notes:
            count, norm = map(float, values)
            if count == self._count:
                continue
            self._count = count
            ids = list(dict.fromkeys(name for part in gather_json(ids) for name in part))
            if jax.process_index() == 0:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, "grad_norm": str(norm), "ids": ids}) + "\n")
            shown = ", ".join(ids[:4]) + f" and {len(ids) - 4} more" * (len(ids) > 4)
            lines.append(f"step {step} was skipped: the norm of its gradient is {norm:.4g}; its examples: {shown} (see {self.path})")
        return lines


class Progress:
    """What process 0 shows of a run's steps: a bar on a terminal, elsewhere a plain line for each logged step."""

    def __init__(self, stage: str, first: int, total: int, items_per_step: int):
        self._stage, self._items = stage, items_per_step
        self._bar = tqdm(
            total=total, initial=first, desc=stage, dynamic_ncols=True, mininterval=0.5, smoothing=0.1,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        )  # fmt: skip

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows those of the `scalars` of a step that are in `SHOWN`, and the speed since the last one shown."""
        seconds, total = scalars["perf/step_s"], self._bar.total
        shown = [f"{name} {scalars[name]:.4g}" for name in SHOWN if name in scalars]
        text = ", ".join([*shown, f"{seconds:.3g} s/step", f"{self._items / seconds:.3g} samples/s"])
        if self._bar.disable:
            left = tqdm.format_interval((total - step) * seconds)
            say(f"{self._stage} {step}/{total}, {left} left, {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self.advance(step)

    def say(self, text: str) -> None:
        """Prints a text above the bar."""
        with tqdm.external_write_mode():
            say(text)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
