"""Metrics on disk survive crashes and resumes; the progress line shows rate and time left."""

import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from xomni_jax.training.metrics import MetricWriter, Progress


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


def write(run_dir, steps, resume_step=0, value=lambda step: 1.0 / step):
    writer = MetricWriter(run_dir, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss/total": value(step), "optim/lr": 0.5})
    return writer


def test_one_line_and_one_event_per_step(tmp_path):
    write(tmp_path, (1, 2, 3)).close()
    assert lines(tmp_path) == [{"step": s, "loss/total": 1.0 / s, "optim/lr": 0.5} for s in (1, 2, 3)]
    assert board_scalars(tmp_path)[2, "loss/total"] == 0.5


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
    writer = write(tmp_path, (1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    writer.close()


def test_resume_drops_the_steps_that_run_again(tmp_path):
    """Killed after step 5 with a checkpoint of step 3, in the middle of writing a line."""
    write(tmp_path, range(1, 6)).close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "loss/to')
    write(tmp_path, (4, 5, 6), resume_step=3, value=lambda step: 10.0).close()
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    assert [line["loss/total"] for line in got] == [1.0, 0.5, 1 / 3, 10.0, 10.0, 10.0]


def test_a_run_that_starts_over_leaves_nothing_of_the_old(tmp_path):
    write(tmp_path, (1, 2)).close()
    write(tmp_path, (1,), value=lambda step: 7.0).close()
    assert [line["loss/total"] for line in lines(tmp_path)] == [7.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_stay_valid_json(tmp_path, value):
    write(tmp_path, (1,), value=lambda step: value).close()
    assert lines(tmp_path)[0]["loss/total"] is None


def test_images_go_to_the_board(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.image(3, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert any(path.stat().st_size > 100 for path in (tmp_path / "tensorboard").iterdir())


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writer = write(tmp_path / "run", (1,))
    writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert not (tmp_path / "run").exists()


def test_progress_line(capsys):
    """Stage, position, time left, watched numbers and items per second; starts where a resumed run does."""
    bar = Progress("grpo", first=2, total=10, items_per_step=32)
    bar.advance(3)
    bar.show(6, {"loss/grpo": 0.123456, "grpo/kl": 0.01, "perf/step_s": 1.0})
    bar.close()
    text = capsys.readouterr().err.split("\r")[-1]
    assert "grpo:" in text and "6/10" in text and "grpo=0.1235" in text and "grpo/kl=0.01" in text and "step_s" not in text
    assert "<" in text, "time left"
