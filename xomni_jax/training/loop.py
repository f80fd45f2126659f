"""The one training loop: every stage runs through `train`, only its `Stage` differs."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from xomni_jax.checkpoint.store import RunCheckpoints
from xomni_jax.training.config import ConfigError, RunConfig
from xomni_jax.training.metrics import MetricWriter, Progress
from xomni_jax.training.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.training.state import TrainState


@dataclasses.dataclass
class Stage:
    """What the loop needs to know of a stage.

    Attributes:
      state: the starting state, on its devices.
      batches: endless iterator with `get_state() -> dict` (JSON-able) and `set_state(dict)`.
      step: (state, batch, step number) -> (state, metrics of scalars). Before it changes the state it may raise StopRequested or StepRefused.
      export: (state, model directory, provenance) -> writes everything `xomni_jax.load` needs.
      grid: (state, step number) -> uint8 [H, W, 3] picture for the run folder, or None.
      items_per_step: examples or samples one step handles, for the rate.
      close: frees what the stage holds (connections), however the run ends.
    """

    state: TrainState
    batches: Iterator[Any]
    step: Callable[[TrainState, Any, int], tuple[TrainState, Mapping[str, Any]]]
    export: Callable[[TrainState, Path, dict[str, Any]], None]
    grid: Callable[[TrainState, int], np.ndarray] | None = None
    items_per_step: int = 1
    close: Callable[[], None] = lambda: None


def key_for(seed: int, step: int, purpose: int) -> jax.Array:
    """Counted randomness: the key of one purpose in one step, the same in a resumed run."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def train(run: RunConfig, stage: Stage, stop: StopSignal) -> Path | None:
    """Runs a stage to its last step, resuming from the newest checkpoint of its run directory.

    Returns the directory of the final model, or None when stopped early (then everything is saved).

    Raises:
      FloatingPointError: a loss or norm is not finite; the message names the step and the last checkpoint.
      StepRefused: from the stage; everything is saved before.
    """
    with contextlib.ExitStack() as ending:
        ending.callback(stage.close)
        run_dir = Path(run.run_dir)
        checkpoints = RunCheckpoints(run_dir / "checkpoints", keep=run.keep)
        ending.callback(checkpoints.close)
        state, batches, first = stage.state, stage.batches, 0

        # ---- resume ----
        if checkpoints.latest() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            first, state, data = checkpoints.restore(abstract)
            batches.set_state(data)
            print(f"resuming {run_dir} after step {first}", flush=True)
        if first > run.steps:
            raise ConfigError(f"config.steps={run.steps}: {run_dir} has already made {first} steps; raise it or use another run_dir")

        # ---- steps ----
        writer = MetricWriter(run_dir, resume_step=first)
        ending.callback(writer.close)
        step, data, metrics, refused = first, batches.get_state(), {}, None
        draw_grid(stage, state, run, writer, step)
        progress = Progress(run.stage, first, run.steps, stage.items_per_step)
        logged, logged_at = step, time.perf_counter()
        try:
            while step < run.steps and not stop.requested:
                batch = next(batches)
                state, metrics = stage.step(state, batch, step)
                step, data = step + 1, batches.get_state()
                logs, saves = step % run.log_every == 0 or step == run.steps, step % run.save_every == 0 and step < run.steps
                if logs or saves:  # what is about to be saved must be finite
                    scalars = finite_scalars(metrics, step, checkpoints)
                if logs:
                    now = time.perf_counter()  # the metrics above have waited for the device
                    scalars |= {"perf/seconds": now - logged_at, "perf/step_s": (now - logged_at) / (step - logged)}
                    logged, logged_at = step, now
                    writer.write(step, scalars)
                    progress.show(step, scalars)
                else:
                    progress.advance(step)
                if saves:
                    checkpoints.save(step, state, data)
                if run.grid_every and step % run.grid_every == 0 and step < run.steps:
                    draw_grid(stage, state, run, writer, step)
        except StopRequested:
            pass  # raised inside a wait, before the step changed anything: `state` and `data` are those of `step`
        except StepRefused as e:
            refused = e
        finally:
            progress.close()

        # ---- end ----
        finite_scalars(metrics, step, checkpoints)
        checkpoints.save(step, state, data, wait=True)
        if refused is not None:
            raise refused
        if step < run.steps:
            print(f"stopped after step {step} of {run.steps}, saved in {run_dir / 'checkpoints'}; the same command goes on from here", flush=True)
            return None
        draw_grid(stage, state, run, writer, step)
        stage.export(state, run_dir / "model", {"run": run.stage, "step": step, "seed": run.seed})
        print(f"finished: model in {run_dir / 'model'}, metrics in {run_dir / 'metrics.jsonl'}", flush=True)
        return run_dir / "model"


def finite_scalars(metrics: Mapping[str, Any], step: int, checkpoints: RunCheckpoints) -> dict[str, float]:
    """A step's metrics as numbers. Refuses to train on after a loss, or a norm of gradients or parameters, that is none."""
    scalars = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in scalars.items() if name.startswith(("loss/", "optim/")) and not np.isfinite(value)]
    if bad:
        last = checkpoints.latest()
        saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last} in {checkpoints.directory}"
        raise FloatingPointError(
            f"{bad[0]} is {scalars[bad[0]]} at step {step}, {saved}; lower config.optimizer.learning_rate and start in another run_dir"
        )
    return scalars


def draw_grid(stage: Stage, state: TrainState, run: RunConfig, writer: MetricWriter, step: int) -> None:
    """Saves the stage's picture of the moment to RUN/images/."""
    if stage.grid is None or not run.grid_every:
        return
    picture = stage.grid(state, step)
    folder = Path(run.run_dir) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"step_{step:06d}.png")
    writer.image(step, "samples", picture)


def tile(images: np.ndarray, columns: int, margin: int = 2) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one picture with `columns` images a row on a white ground."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        y, x = margin + y * (height + margin), margin + x * (width + margin)
        out[y : y + height, x : x + width] = image
    return out
