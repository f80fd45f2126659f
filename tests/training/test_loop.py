"""The loop by itself, on a stage that counts: what is saved, logged and drawn when, and how a run ends."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.core.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.training.loop import key_for, train
from xomni_jax.training.stage import Grid, RunConfig, RunningStage
from xomni_jax.training.state import TrainState


class Counter:
    """Batches 0, 1, 2, ... with a state."""

    def __init__(self):
        self.next, self.ids, self.waited = 0, [], 0.0

    def __next__(self):
        self.next += 1
        self.waited += 0.5
        self.ids = [f"example {self.next - 1}"]
        return self.next - 1

    def get_state(self):
        """Where it stands."""
        return {"next": self.next}

    def set_state(self, state):
        """Goes there."""
        self.next = state["next"]


def counting(step=None, closed=None):
    """A stage whose parameter is the sum of its batches; `step(number)` may interfere."""

    def one(state, batch, number):
        extra = (step and step(number)) or {}
        total = state.params["sum"] + batch
        return state.replace(step=state.step + 1, params={"sum": total}), {
            "loss/total": 1.0 / total if number else 1.0,
            "batch": batch,
        } | extra

    def export(state, directory, note):
        directory.mkdir()
        (directory / "note.json").write_text(json.dumps(note | {"sum": float(state.params["sum"])}))

    state = TrainState(jnp.int32(0), {"sum": jnp.float32(0)}, (), {})
    grid = lambda state, number: Grid(np.full((1, 4, 6, 3), number, np.uint8), 1, {"caption": [f"é {number}"]})  # noqa: E731
    return RunningStage(state, Counter(), one, export, grid, close=lambda: closed is not None and closed.append(True))


def run(tmp_path, **changes):
    defaults = dict(stage="count", run_dir=str(tmp_path / "run"), steps=7, batch_size=1, log_every=2, save_every=3, grid_every=5, keep=3)
    return RunConfig(**defaults | changes)


def go(config, stage):
    with StopSignal() as stop:
        return train(config, stage, stop)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def saved(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints", keep=9)
    steps = list(checkpoints.manager.all_steps())
    checkpoints.close()
    return steps


def test_what_happens_when(tmp_path, capsys):
    closed = []
    assert go(run(tmp_path), counting(closed=closed)) == tmp_path / "run" / "model"
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 7]  # every second, and the last
    assert saved(tmp_path) == [3, 6, 7]
    assert sorted(p.name for p in (tmp_path / "run" / "images").iterdir()) == [
        f"step_{n:06d}.{end}" for n in (0, 5, 7) for end in ("jsonl", "png")
    ]
    assert json.loads((tmp_path / "run" / "images" / "step_000005.jsonl").read_text()) == {"column": 1, "caption": "é 5"}
    assert json.loads((tmp_path / "run" / "model" / "note.json").read_text()) == {"run": "count", "step": 7, "seed": 0, "sum": 21.0}
    assert "finished: model in" in capsys.readouterr().out and closed == [True]


def test_a_finished_run_exports_again(tmp_path):
    go(run(tmp_path), counting())
    (tmp_path / "run" / "model" / "note.json").unlink()
    (tmp_path / "run" / "model").rmdir()
    go(run(tmp_path), counting(lambda number: pytest.fail("no step is left to make")))
    assert json.loads((tmp_path / "run" / "model" / "note.json").read_text())["sum"] == 21.0


def test_a_run_may_be_made_longer(tmp_path):
    go(run(tmp_path, steps=4), counting())
    (tmp_path / "run" / "model" / "note.json").unlink()
    (tmp_path / "run" / "model").rmdir()
    go(run(tmp_path, steps=7), counting())
    assert json.loads((tmp_path / "run" / "model" / "note.json").read_text())["sum"] == 21.0


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    go(run(tmp_path, run_dir=str(tmp_path / "straight")), counting())
    assert go(run(tmp_path), counting(lambda n: signal.raise_signal(signal.SIGTERM) if n == 4 else None)) is None
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5" / "state")
    go(run(tmp_path), counting())
    assert "5 is damaged" in (told := capsys.readouterr().out) and f"resuming {tmp_path / 'run'} after step 3" in told
    assert saved(tmp_path) == [3, 6, 7]
    notes = [(tmp_path / name / "model" / "note.json").read_text() for name in ("run", "straight")]
    assert notes[0] == notes[1] and [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 7]


def test_fewer_steps_than_made(tmp_path):
    go(run(tmp_path), counting())
    with pytest.raises(ConfigError, match="config.steps=5: .* has already made 7 steps"):
        go(run(tmp_path, steps=5), counting())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step(tmp_path, number, capsys):
    closed = []
    assert go(run(tmp_path), counting(lambda n: signal.raise_signal(number) if n == 4 else None, closed)) is None
    assert saved(tmp_path) == [3, 5] and closed == [True]
    assert "stopped after step 5 of 7" in capsys.readouterr().out and not (tmp_path / "run" / "model").exists()
    go(run(tmp_path), counting())
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 7] and lines(tmp_path)[-1]["batch"] == 6
    assert "after step 5" in capsys.readouterr().out


def refuse(kind):
    def step(number):
        if number == 4:
            raise kind("not now")

    return step


def test_a_wait_that_was_interrupted_repeats_its_batch(tmp_path):
    assert go(run(tmp_path), counting(refuse(StopRequested))) is None
    assert saved(tmp_path) == [3, 4]
    go(run(tmp_path), counting())
    assert json.loads((tmp_path / "run" / "model" / "note.json").read_text())["sum"] == 21.0


def test_a_refused_step_is_saved_before_it_is_told(tmp_path):
    closed = []
    with pytest.raises(StepRefused, match="not now"):
        go(run(tmp_path), counting(refuse(StepRefused), closed))
    assert saved(tmp_path) == [3, 4] and closed == [True]
    go(run(tmp_path), counting())
    assert json.loads((tmp_path / "run" / "model" / "note.json").read_text())["sum"] == 21.0


@pytest.mark.parametrize("name", ["loss/total", "optim/grad_norm"])
@pytest.mark.parametrize("at, told", [(2, "there is no checkpoint yet"), (5, "the last good checkpoint is step 3"), (6, "is step 6")])
def test_numbers_that_are_none_are_not_saved(tmp_path, name, at, told):
    with pytest.raises(FloatingPointError, match=f"{name} is nan at step {at + 1}, .*{told}"):
        go(run(tmp_path), counting(lambda n: {name: float("nan")} if n == at else None))
    assert saved(tmp_path) == [s for s in (3, 6) if s <= at]


def test_a_stop_does_not_save_what_is_not_finite(tmp_path):
    def step(number):
        if number == 4:
            signal.raise_signal(signal.SIGINT)
            return {"loss/total": float("inf")}

    with pytest.raises(FloatingPointError, match="loss/total is inf at step 5"):
        go(run(tmp_path), counting(step))
    assert saved(tmp_path) == [3]


def test_an_error_leaves_a_whole_checkpoint(tmp_path):
    closed = []
    with pytest.raises(RuntimeError):
        go(run(tmp_path), counting(refuse(RuntimeError), closed))
    assert saved(tmp_path) == [3] and closed == [True]


def test_no_grids(tmp_path):
    go(run(tmp_path, grid_every=0, steps=2), counting())
    assert not (tmp_path / "run" / "images").exists()


def test_images_of_a_grid():
    image = Grid(np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 4, 5, 3), np.uint8), columns=2).image(margin=1)
    assert image.shape == (11, 13, 3)
    assert (image[1:5, 7:12] == 1).all() and (image[6:10, 1:6] == 2).all() and (image[6:10, 7:12] == 255).all()
    Image.fromarray(image)


def test_keys_are_counted():
    keys = {tuple(jax.random.key_data(key_for(*a)).tolist()) for a in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(keys) == 4
    assert (jax.random.key_data(key_for(3, 4, 5)) == jax.random.key_data(key_for(3, 4, 5))).all()
