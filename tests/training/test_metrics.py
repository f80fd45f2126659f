"""Metrics on disk survive crashes and resumes; the progress line shows rate and time left."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from xomni_jax.core.config import ConfigError
from xomni_jax.training.metrics import MetricWriter, Progress, check_wandb
from xomni_jax.training.run import run_stage
from xomni_jax.training.stage import Grid, RunConfig

GRID = Grid(np.zeros((2, 4, 4, 3), np.uint8), 1, {"caption": ["红色", 'a "b"'], "answer": ["x", ""]}, by="row")


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board_scalars(run_dir) -> dict:
    """{(step, name): value} of the TensorBoard event files: records framed as length (8), crc (4), bytes, crc (4)."""
    out = {}
    for path in (run_dir / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            out |= {(event.step, v.tag): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
            at += size + 16
    return out


def write(run_dir, steps, resume_step=0, value=lambda step: 1.0 / step, project=""):
    with MetricWriter(run_dir, resume_step=resume_step, project=project) as writer:
        for step in steps:
            writer.write(step, {"loss/total": value(step), "optim/lr": 0.5})
            writer.grid(step, GRID)


def test_one_line_and_one_event_per_step(tmp_path):
    write(tmp_path, (1, 2, 3))
    assert lines(tmp_path) == [{"step": s, "loss/total": 1.0 / s, "optim/lr": 0.5} for s in (1, 2, 3)]
    assert board_scalars(tmp_path)[2, "loss/total"] == 0.5


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss/total": 1.0})
        assert lines(tmp_path) == [{"step": 1, "loss/total": 1.0}]


def test_resume_drops_the_steps_that_run_again(tmp_path):
    """Killed after step 5 with a checkpoint of step 3, in the middle of writing a line."""
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "loss/to')
    write(tmp_path, (4, 5, 6), resume_step=3, value=lambda step: 10.0)
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    assert [line["loss/total"] for line in got] == [1.0, 0.5, 1 / 3, 10.0, 10.0, 10.0]


def test_a_run_that_starts_over_leaves_nothing_of_the_old(tmp_path):
    write(tmp_path, (1, 2))
    write(tmp_path, (1,), value=lambda step: 7.0)
    assert [line["loss/total"] for line in lines(tmp_path)] == [7.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_stay_valid_json(tmp_path, value):
    write(tmp_path, (1,), value=lambda step: value)
    assert lines(tmp_path)[0]["loss/total"] is None


def test_grids_lie_beside_their_texts(tmp_path):
    """In any script and in the order of the columns, or of the rows; TensorBoard has both."""
    write(tmp_path, (3,))
    notes = [json.loads(line) for line in (tmp_path / "images" / "step_000003.jsonl").read_text(encoding="utf-8").splitlines()]
    assert notes == [{"row": 1, "caption": "红色", "answer": "x"}, {"row": 2, "caption": 'a "b"', "answer": ""}]
    with Image.open(tmp_path / "images" / "step_000003.png") as image:
        assert image.size == (8, 14)
    assert "红色".encode() in b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write(tmp_path / "run", (1,), project="signs")
    assert not (tmp_path / "run").exists()


class FakeWandb(types.ModuleType):
    """What is used of Weights & Biases, and what it was told."""

    def __init__(self, mode="offline", account=False):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.told, self.util = [], types.SimpleNamespace(generate_id=lambda: f"id{len(self.told)}")
        self.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
        self.login = lambda prompt: account
        self.Image = lambda image, caption: (image.shape, caption.count("\n"))

    def init(self, **settings):
        """A run that notes what it is told."""
        self.told.append(settings)
        return types.SimpleNamespace(
            log=lambda values, step: self.told.append((step, values)), finish=lambda exit_code: self.told.append(exit_code)
        )


def test_a_resumed_run_is_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    (tmp_path / "config.json").write_text('{"seed": 5}')
    write(tmp_path, (1,), project="signs")
    with pytest.raises(FloatingPointError), MetricWriter(tmp_path, 1, "signs"):
        raise FloatingPointError
    first, scalars, grid, ended, second, failed = wandb.told
    assert (
        first == second and first["id"] == "id0" and (first["project"], first["config"], first["dir"]) == ("signs", {"seed": 5}, tmp_path)
    )
    assert scalars == (1, {"loss/total": 1.0, "optim/lr": 0.5}) and grid == (1, {"samples": ((14, 8, 3), 2)}) and (ended, failed) == (0, 1)


@pytest.mark.parametrize("found, words", [(None, r"not installed; pip install 'xomni_jax\[wandb\]'"), (FakeWandb("online"), "wandb login")])
def test_what_weights_and_biases_lacks_is_said_before_the_run_begins(tmp_path, monkeypatch, found, words):
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(ConfigError, match=f"config.wandb=signs: .*{words}"):
        run_stage(RunConfig(stage="sft", run_dir=str(tmp_path / "run"), wandb="signs"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wandb", [FakeWandb("online", account=True), FakeWandb("offline")])
def test_an_account_is_needed_online_only(monkeypatch, wandb):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    check_wandb("signs")


def test_progress_line(capsys):
    """Stage, position, time left, watched numbers and items per second; starts where a resumed run does."""
    bar = Progress("grpo", first=2, total=10, items_per_step=32)
    bar.advance(3)
    bar.show(6, {"loss/grpo": 0.123456, "grpo/kl": 0.01, "perf/step_s": 1.0})
    bar.close()
    text = capsys.readouterr().err.split("\r")[-1]
    assert "grpo:" in text and "6/10" in text and "grpo=0.1235" in text and "grpo/kl=0.01" in text and "step_s" not in text
    assert "<" in text, "time left"
