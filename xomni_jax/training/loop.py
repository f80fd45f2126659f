"""The training loop, which all stages share. What differs between them is their `RunningStage`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.training.metrics import MetricWriter, Progress, SkippedSteps
from xomni_jax.training.operations import CompileLog, Meter, Profile, say
from xomni_jax.training.stage import RunConfig, RunningStage
from xomni_jax.training.validation import LOSS, smallest_loss

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
      FloatingPointError: a loss or norm is not finite and the step was not skipped, or as many steps in a row were skipped as
        `config.guard.limit` allows; the message names the step and the last checkpoint.
      StepRefused: by the stage; the run has saved.
    """
    with contextlib.ExitStack() as ending:
        session, refused = Session(run, stage, profile, ending), None
        try:
            while session.step < run.steps and not stop.reached():
                session.make_step()
        except StopRequested:
            pass  # raised before the step changed anything
        except StepRefused as e:
            refused = e
        finally:
            session.progress.close()
        session.save_last()
        if refused is not None:
            raise refused
        if session.step < run.steps:
            saved = session.run_dir / "checkpoints"
            say(f"stopped after step {session.step} of {run.steps}, saved in {saved}; the same command goes on from here")
            return None
        return session.export()


class Session:
    """The steps of a run from one start to one end, and everything that is due between them.

    Attributes:
      state: after `step` steps.
      data: where the batches stand after them.
      metrics: of the last step.
    """

    def __init__(self, run: RunConfig, stage: RunningStage, profile: tuple[int, int] | None, ending: contextlib.ExitStack):
        """Resumes the run. What must be closed is left to `ending`."""
        ending.callback(stage.close)
        self.run, self.stage, self.run_dir = run, stage, Path(run.run_dir)
        self.meter, self.compiled = Meter(stage.flops), ending.enter_context(CompileLog())
        self.trace = Profile(profile, self.run_dir / "profile")
        ending.callback(self.trace.close)
        self.checkpoints = RunCheckpoints(self.run_dir / "checkpoints", keep=run.keep, keep_every=run.keep_every)
        ending.callback(self.checkpoints.close)
        self.state, self.metrics = stage.state, dict[str, Any]()
        self.step = self.first = self.resume()
        self.data = stage.batches.get_state()
        self.writer = ending.enter_context(MetricWriter(self.run_dir, self.first, run.wandb))
        self.smallest = smallest_loss(self.run_dir) if stage.validation else 0.0
        self.skipped = SkippedSteps(self.run_dir, int(self.state.guard.get("skipped", 0)), self.first)
        self.draw_grid()
        self.progress = Progress(run.stage, self.first, run.steps, stage.items_per_step)
        self.logged, self.logged_at, self.saved_at, self.compiling = self.first, time.perf_counter(), time.monotonic(), 0.0
        self.waited = 0.0

    def resume(self) -> int:
        """Restores the newest checkpoint, if there is one; returns the number of steps that are made."""
        first = 0
        if self.checkpoints.latest() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
            with self.meter.aside():
                first, self.state, data = self.checkpoints.restore(abstract)
            self.stage.batches.set_state(data)
            say(f"resuming {self.run_dir} after step {first}")
        if first > self.run.steps:
            raise ConfigError(
                f"config.steps={self.run.steps}: {self.run_dir} has already made {first} steps; raise it or use another run_dir"
            )
        return first

    def make_step(self) -> None:
        """One step, and what is due after it."""
        run, number = self.run, self.step + 1
        self.trace.before(number)
        self.compiled.since()
        so_far = self.compiled.seconds
        with jax.profiler.StepTraceAnnotation(run.stage, step_num=number):
            batch = next(self.stage.batches)
            self.state, self.metrics = self.stage.step(self.state, batch, self.step)
        self.step, self.data = number, self.stage.batches.get_state()
        self.skipped.note(number, self.stage.batches.ids, self.metrics)
        self.trace.after(number, self.metrics)
        self.compiling += self.compiled.seconds - so_far
        if (names := self.compiled.since()) and number > self.first + WARM_UP:
            self.progress.say(f"step {number} compiled again: {', '.join(names[-3:])}; changing shapes cost this time whenever they occur")
        validates = self.stage.validation and (number % self.stage.validation.every == 0 or number == run.steps)
        logs = number % run.log_every == 0 or number == run.steps or validates
        saves = number < run.steps and (number % run.save_every == 0 or logs and time_to_save(run, self.saved_at))
        scalars = self.scalars() if logs or saves else {}  # what is saved must be finite
        if validates:
            scalars |= self.validate()
        if logs:
            self.log(scalars)
        else:
            self.progress.advance(number)
        if saves:
            with self.meter.aside():
                self.checkpoints.save(number, self.state, self.data)
                self.saved_at = time.monotonic()
        if run.grid_every and number % run.grid_every == 0 and number < run.steps:
            self.draw_grid()

    def scalars(self) -> dict[str, float]:
        """The metrics of the last step as numbers; says which steps since the last call were skipped.

        Raises:
          FloatingPointError: see `train`.
        """
        for line in self.skipped.write():
            self.progress.say(line)
        scalars = {name: float(value) for name, value in self.metrics.items()}
        in_row = scalars.pop("guard/in_row", 0)
        bad = [name for name, value in scalars.items() if name.startswith(("loss/", "optim/")) and not np.isfinite(value)]
        if 0 < in_row < self.run.guard.limit or not in_row and not bad:
            return {name: value for name, value in scalars.items() if value or name != "guard/skipped"}
        last, what = self.checkpoints.latest(), f"{bad[0]} is {scalars[bad[0]]}" if bad else "the gradient is far larger than usual"
        saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last} in {self.checkpoints.directory}"
        if in_row:
            what += f", {self.run.guard.limit} steps in a row were skipped (config.guard.limit); {self.skipped.path} has their examples"
        raise FloatingPointError(f"{what} at step {self.step}, {saved}; lower config.optimizer.learning_rate and start in another run_dir")

    def validate(self) -> dict[str, float]:
        """The metrics of a validation. Writes the model to RUN/best if its loss is the smallest so far and the run keeps that model."""
        with self.meter.aside():
            state = self.state.averaged()
            scalars = self.stage.validation(state)
            if self.stage.validation.best and scalars[LOSS] < self.smallest:
                self.smallest = scalars[LOSS]
                self.stage.export(state, self.run_dir / "best", self.note() | {LOSS: self.smallest})
        return scalars

    def log(self, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step, with those of speed; the device has computed them."""
        now = time.perf_counter()
        seconds = now - self.logged_at
        steps, waited = self.step - self.logged, self.stage.batches.waited
        speed = {"perf/seconds": seconds, "perf/step_s": seconds / steps, "perf/data_s": (waited - self.waited) / steps}
        speed |= self.meter.scalars(seconds, self.compiling)
        self.logged, self.logged_at, self.waited = self.step, now, waited
        self.writer.write(self.step, scalars | speed)
        self.progress.show(self.step, scalars | speed)

    def draw_grid(self) -> None:
        """Writes the current images of the stage, unless the run is told to stop meanwhile."""
        if self.stage.grid is None or not self.run.grid_every:
            return
        with self.meter.aside():
            try:
                self.writer.grid(self.step, self.stage.grid(self.state.averaged(), self.step))
            except StopRequested:
                pass  # the loop will notice it, too

    def save_last(self) -> None:
        """Saves the state and waits until it is on disk."""
        self.scalars()
        self.checkpoints.save(self.step, self.state, self.data, wait=True)

    def export(self) -> Path:
        """Writes the final images and the model; returns its directory."""
        self.draw_grid()
        directory = self.run_dir / "model"
        state = self.state.averaged() if self.run.ema.export else self.state
        self.stage.export(state, directory, self.note())
        say(f"finished: model in {directory}, metrics in {self.run_dir / 'metrics.jsonl'}")
        return directory

    def note(self) -> dict[str, Any]:
        """What a model's description says of where it comes from."""
        return {"run": self.run.stage, "step": self.step, "seed": self.run.seed}


def time_to_save(run: RunConfig, saved_at: float) -> bool:
    """Whether `save_minutes` have passed since the last save, according to the clock of process 0."""
    return bool(run.save_minutes) and gather_json(time.monotonic() - saved_at >= 60 * run.save_minutes)[0]
