"""Metrics on disk survive crashes and resumes; what is shown of a run's progress has rate and time left."""

import json
import os
import sys

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


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Weights & Biases without settings or account of whoever runs the tests."""
    wandb = pytest.importorskip("wandb", reason="brought by the extra [wandb]")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield wandb
    wandb.teardown()


def test_a_resumed_run_is_one_run_of_weights_and_biases(tmp_path, monkeypatch, wandb):
    """Kept in the run directory when offline: scalars, images with their captions, and the configuration."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("signs")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"warmth": 5}')
    write(run_dir, (1,), project="signs")
    write(run_dir, (2,), resume_step=1, project="signs")
    wandb.teardown()  # its process writes on its own
    name = (run_dir / "wandb_id").read_text()
    first, second = sorted(run_dir.glob(f"wandb/offline-run-*/run-{name}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for path in (first, second):
        assert all(word in path.read_bytes() for word in (b"signs", b"warmth", b"loss/total", "红色".encode()))
        assert len(list(path.parent.rglob("samples_*.png"))) == 1


def test_no_account_is_said_before_the_run_begins(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="config.wandb=signs: no login; run wandb login, or set WANDB_MODE=offline"):
        run_stage(RunConfig(stage="sft", run_dir=str(tmp_path / "run"), wandb="signs"))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.wandb=signs: the package wandb is not installed; pip install 'xomni_jax\[wandb\]'"):
        check_wandb("signs")


SHOWN = {"loss/grpo": 0.123456, "grpo/kl": 0.01, "optim/lr": 0.5, "perf/step_s": 2.0}


def test_without_a_terminal_each_logged_step_is_a_plain_line(capsys):
    progress = Progress("grpo", first=2, total=10, items_per_step=32)
    progress.advance(3)
    progress.show(6, SHOWN)
    progress.say("step 6 was skipped")
    progress.close()
    told = capsys.readouterr()
    line = "grpo 6/10, 00:08 left, loss/grpo 0.1235, grpo/kl 0.01, 2 s/step, 16 samples/s"
    assert told.out == f"{line}\nstep 6 was skipped\n" and not told.err


def test_on_a_terminal_a_bar_says_the_same(capsys, monkeypatch):
    """It starts where a resumed run does, and what is said meanwhile stands above it."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress("grpo", first=2, total=10, items_per_step=32)
    progress.show(6, SHOWN)
    progress.say("step 6 was skipped")
    progress.close()
    told = capsys.readouterr()
    first, last = told.err.split("\r")[1], told.err.split("\r")[-1]
    assert first.startswith("grpo 2/10 |") and last.startswith("grpo 6/10 |")
    assert " left, loss/grpo 0.1235, grpo/kl 0.01, 2 s/step, 16 samples/s" in last and told.out == "step 6 was skipped\n"
