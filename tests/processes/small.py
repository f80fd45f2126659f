"""One of two processes training something small, whose steps wait and exchange as those of GRPO do, and meet what the test has ordered.

python -m tests.processes.small FOLDER; FOLDER/order is "term" or "kill" (once), or is not there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.training.test_loop import Counter
from xomni_jax.cli.train import together
from xomni_jax.sharding import distributed
from xomni_jax.sharding.arrays import batch_sharding, local_rows, spread, whole
from xomni_jax.sharding.mesh import make_mesh, replicated
from xomni_jax.training.config import RunConfig
from xomni_jax.training.loop import Stage, train
from xomni_jax.training.preemption import StopRequested, StopSignal
from xomni_jax.training.state import TrainState

ROWS, STEPS = 8, 6
TERM_AT, KILL_AT = 2, 4  # steps made before


def order(folder: Path) -> str:
    """What the test wants of process 1, once."""
    path = folder / "order"
    if jax.process_index() != 1 or not path.is_file():
        return ""
    text = path.read_text()
    path.unlink()
    return text


def make(folder: Path, stop: StopSignal) -> Stage:
    """Rows that drift towards the sine of their batch; the mean over all rows takes both processes."""
    mesh = make_mesh(dict(fsdp=4))
    sharding = batch_sharding(mesh)
    rows = local_rows(mesh, ROWS)

    placed = TrainState(replicated(mesh), {"w": sharding}, (), {})
    start = lambda: TrainState(jnp.int32(0), {"w": jnp.arange(ROWS * 16.0).reshape(ROWS, 16) / 7}, (), {})  # noqa: E731

    def update(state, x):
        w = state.params["w"]
        w = jax.lax.with_sharding_constraint(w + 0.1 * jnp.sin(x + w.mean()), sharding)
        return state.replace(step=state.step + 1, params={"w": w}), {"loss/total": jnp.square(w).mean()}

    update = jax.jit(update, out_shardings=(placed, replicated(mesh)))
    ordered = order(folder)

    def step(state, number, step_number):
        stop.check()  # as after every chunk of rollouts
        scores = list(rows)
        try:
            if ordered == "term" and step_number == TERM_AT:
                os.kill(os.getpid(), signal.SIGTERM)
            waits = (folder / "waits").is_file() and step_number == TERM_AT
            end = time.monotonic() + (120 if waits else 0)  # as for rewards
            while time.monotonic() < end:
                stop.check_waiting()
                time.sleep(0.05)
        except StopRequested:
            scores = []
        table = distributed.gather_json(scores)
        stop.check()
        assert sorted(row for part in table for row in part) == list(range(ROWS))
        if ordered == "kill" and step_number == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        x = np.random.default_rng(number).standard_normal((ROWS, 16)).astype(np.float32)
        return update(state, spread(mesh, x[rows], ROWS))

    def export(state, directory, note):
        w = whole(state.params["w"])
        if jax.process_index() == 0:
            directory.mkdir()
            np.save(directory / "w.npy", w)

    return Stage(jax.jit(start, out_shardings=placed)(), Counter(), step, export)


def main(folder: Path) -> None:
    """Trains, or goes on."""
    line = distributed.start({})

    def run():
        with StopSignal(line) as stop:
            config = RunConfig("small", str(folder / "run"), steps=STEPS, log_every=1, save_every=1, grid_every=0)
            train(config, make(folder, stop), stop)

    together(line, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
