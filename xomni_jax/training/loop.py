"""The training loop, which all stages share. What differs between them is their `RunningStage`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from xomni_jax.checkpoint.store import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.training.metrics import MetricWriter, Progress
from xomni_jax.training.operations import CompileLog, Meter, Profile, say
from xomni_jax.training.stage import RunConfig, RunningStage
from xomni_jax.training.state import TrainState

WARM_UP = 2  # first steps after a start, which may compile


def key_for(seed: int, step: int, purpose: int) -> jax.Array:
    """The random key of one purpose in one step, which is the same in a resumed run."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def train(run: RunConfig, stage: RunningStage, stop: StopSignal, profile: tuple[int, int] | None = None) -> Path | None:
    """Runs a stage to its last step, resuming from the newest checkpoint of its run directory.

    Args:
      profile: first and last step, counted from 1, of a trace in RUN/profile.

    Returns:
      The directory of the final model; None if the run was stopped early and has saved.

    Raises:
      FloatingPointError: a loss or norm is not finite; the message names the step and the last checkpoint.
      StepRefused: by the stage; the run has saved.
    """
    with contextlib.ExitStack() as ending:
        ending.callback(stage.close)
        run_dir = Path(run.run_dir)
        meter, compiled = Meter(stage.flops), ending.enter_context(CompileLog())
        trace = Profile(profile, run_dir / "profile")
        ending.callback(trace.close)
        checkpoints = RunCheckpoints(run_dir / "checkpoints", keep=run.keep, keep_every=run.keep_every)
        ending.callback(checkpoints.close)
        state, batches, first = stage.state, stage.batches, 0

        # ---- resume ----
        if checkpoints.latest() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            with meter.aside():
                first, state, data = checkpoints.restore(abstract)
            batches.set_state(data)
            say(f"resuming {run_dir} after step {first}")
        if first > run.steps:
            raise ConfigError(f"config.steps={run.steps}: {run_dir} has already made {first} steps; raise it or use another run_dir")

        # ---- steps ----
        writer = MetricWriter(run_dir, resume_step=first)
        ending.callback(writer.close)
        step, data, metrics, refused = first, batches.get_state(), {}, None
        with meter.aside():
            draw_grid(stage, state, run, writer, step)
        progress = Progress(run.stage, first, run.steps, stage.items_per_step)
        logged, logged_at, compiling = step, time.perf_counter(), 0.0
        saved_at = time.monotonic()
        try:
            while step < run.steps and not stop.reached():
                trace.before(step + 1)
                compiled.since()
                so_far = compiled.seconds
                with jax.profiler.StepTraceAnnotation(run.stage, step_num=step + 1):
                    batch = next(batches)
                    state, metrics = stage.step(state, batch, step)
                step, data = step + 1, batches.get_state()
                trace.after(step, metrics)
                compiling += compiled.seconds - so_far
                if (names := compiled.since()) and step > first + WARM_UP:
                    progress.say(f"step {step} compiled again: {', '.join(names[-3:])}; changing shapes cost this time whenever they occur")
                logs = step % run.log_every == 0 or step == run.steps
                saves = step < run.steps and (step % run.save_every == 0 or logs and time_to_save(run, saved_at))
                if logs or saves:  # what is saved must be finite
                    scalars = finite_scalars(metrics, step, checkpoints)
                if logs:
                    now = time.perf_counter()  # finite_scalars has waited for the device
                    scalars |= {"perf/seconds": now - logged_at, "perf/step_s": (now - logged_at) / (step - logged)}
                    scalars |= meter.scalars(now - logged_at, compiling)
                    logged, logged_at = step, now
                    writer.write(step, scalars)
                    progress.show(step, scalars)
                else:
                    progress.advance(step)
                with meter.aside():
                    if saves:
                        checkpoints.save(step, state, data)
                        saved_at = time.monotonic()
                    if run.grid_every and step % run.grid_every == 0 and step < run.steps:
                        draw_grid(stage, state, run, writer, step)
        except StopRequested:
            pass  # raised before the step changed anything: `state` and `data` are those after step `step`
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
            say(f"stopped after step {step} of {run.steps}, saved in {run_dir / 'checkpoints'}; the same command goes on from here")
            return None
        draw_grid(stage, state, run, writer, step)
        stage.export(state, run_dir / "model", {"run": run.stage, "step": step, "seed": run.seed})
        say(f"finished: model in {run_dir / 'model'}, metrics in {run_dir / 'metrics.jsonl'}")
        return run_dir / "model"


def time_to_save(run: RunConfig, saved_at: float) -> bool:
    """Whether `save_minutes` have passed since the last save, according to the clock of process 0."""
    return bool(run.save_minutes) and gather_json(time.monotonic() - saved_at >= 60 * run.save_minutes)[0]


def finite_scalars(metrics: Mapping[str, Any], step: int, checkpoints: RunCheckpoints) -> dict[str, float]:
    """The metrics of a step as numbers. Raises FloatingPointError if a loss, or a norm of gradients or parameters, is not finite."""
    scalars = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in scalars.items() if name.startswith(("loss/", "optim/")) and not np.isfinite(value)]
    if bad:
        last = checkpoints.latest()
        saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last} in {checkpoints.directory}"
        raise FloatingPointError(
            f"{bad[0]} is {scalars[bad[0]]} at step {step}, {saved}; lower config.optimizer.learning_rate and start in another run_dir"
        )
    return scalars


def draw_grid(stage: RunningStage, state: TrainState, run: RunConfig, writer: MetricWriter, step: int) -> None:
    """Saves the current image of the stage to RUN/images/, unless the run is told to stop meanwhile."""
    if stage.grid is None or not run.grid_every:
        return
    try:
        image = stage.grid(state, step)
    except StopRequested:  # the loop will notice it, too
        return
    if jax.process_index() != 0:
        return
    folder = Path(run.run_dir) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"step_{step:06d}.png")
    writer.image(step, "samples", image)


def tile(images: np.ndarray, columns: int, margin: int = 2) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one image with `columns` images per row on a white background."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        y, x = margin + y * (height + margin), margin + x * (width + margin)
        out[y : y + height, x : x + width] = image
    return out
