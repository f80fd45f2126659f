"""The shipped model's card and the long run's bookkeeping, from runs written by hand."""

import json
from pathlib import Path

import pytest

from launch import card, long_run


def write_run(path, seconds, stage="sft", **last):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"stage": stage, "seed": 3, "batch_size": 7, "steps": 20}))
    lines = [{"step": 10 * (i + 1), "perf/seconds": s, "perf/step_s": s / 10} for i, s in enumerate(seconds)]
    lines[-1] |= last
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_control_gets_the_time_of_the_run_it_controls(tmp_path):
    grpo = write_run(tmp_path / "grpo_0", [30.0, 50.0, 40.0])
    speed = write_run(tmp_path / "speed", [90.0, 20.0, 22.0, 18.0])  # the first line holds the compilation
    assert long_run.equal_steps(grpo, speed) == int(120 / 2.0)


def test_collect_averages_over_evaluations_but_not_the_control(tmp_path):
    row = {"word_accuracy": 0.25, "ocr_reward": 0.5, "colour_accuracy": 1.0, "second_reader_accuracy": None}
    for name, accuracy in (("effect_0_0", 0.25), ("effect_1_0", 0.75), ("effect_control", 0.0)):
        (tmp_path / name).mkdir()
        cells = {cell: row | {"word_accuracy": accuracy} for cell in long_run.ROWS}
        report = {"guidance_off": cells, "guidance_on": cells, "rl_holds_up_to_best_of": 4, "sft_temperature_sweep": []}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    write_run(tmp_path / "grpo_0", [1.0, 1.0], **{"reward/total/mean": 1.5})
    long_run.main(["collect", str(tmp_path), str(tmp_path / "all.json")])
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["mean_over_seeds"]["guidance_off"]["rl"]["word_accuracy"] == 0.5
    assert found["mean_over_seeds"]["guidance_on"]["sft"]["second_reader_accuracy"] is None
    assert found["curves"]["grpo_0"] == {
        "step": [10, 20],
        **{n: [None, 1.5 if n == "reward/total/mean" else None] for n in long_run.CURVES},
    }


def test_card_names_command_seed_steps_and_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    write_run(tmp_path / "runs" / "sft", [30.0, 60.0], **{"loss/image": 0.125})
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.json").write_text(json.dumps({"components": {"transformer": {}}}))
    card.main([str(tmp_path / "runs"), str(model)])
    text = (model / "CARD.md").read_text()
    assert "| sft | `xomni train --config=configs/tiny/sft.py --config.steps=20` | 3 | 20 | 7 | 1.5 | loss/image 0.125 |" in text


def test_card_of_no_runs_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"components": {}}))
    with pytest.raises(ValueError, match="holds no runs"):
        card.card(tmp_path, tmp_path)
