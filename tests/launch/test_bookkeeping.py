"""The shipped model's card and the long run's bookkeeping, from runs written by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from launch import card, claim, long_run, unigrpo
from xomni_jax.training.run_directory import save_config
from xomni_jax.training.stage import load_config


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


def test_unigrpo_compares_first_and_last_steps(tmp_path):
    run = write_run(tmp_path / "both_0", [1.0] * 12)
    (run / "model").mkdir()
    write_run(tmp_path / "mmdit_0", [1.0])  # not finished
    lines = [
        json.loads(line) | {n: i / 10 for n in unigrpo.CURVES} for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines())
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = unigrpo.collect(tmp_path)
    assert list(curves) == ["both_0"] and unigrpo.table(curves).splitlines()[-1].split() == [
        "both_0",
        "0.4500",
        "0.6500",
        "0.6500",
        "0.4500",
        "0.6500",
    ]


def test_claim_compares_three_ways_to_go_on(tmp_path, capsys):
    row = {"ocr_reward": 0.5, "colour_accuracy": 1.0, "second_reader_accuracy": None, "ci95": {}}
    minus = {"sft_best_of_16": {"word_accuracy": {"value": 0.25, "ci95": [0.125, 0.5]}}}
    for kind in claim.KINDS:
        for method, accuracy in (("grpo", 0.75), ("more", 0.375)):
            (tmp_path / f"effect_{method}_{kind}_0").mkdir()
            rows = {"sft": 0.25, "sft_best_of_16": 0.5, "rl": accuracy}
            report = {"guidance_off": {name: row | {"word_accuracy": value} for name, value in rows.items()}}
            report["comparisons"] = {"guidance_off": {"rl_minus": minus}}
            (tmp_path / f"effect_{method}_{kind}_0" / "report.json").write_text(json.dumps(report))
    write_run(tmp_path / "sft_0", [1.0, 1.0], **{claim.VALIDATION: 0.5})
    claim.main([str(tmp_path)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines[2:6]] == ["0.250", "0.500", "0.375", "0.750"] and "+0.250" in lines[6]
    assert json.loads((tmp_path / "claim.json").read_text())["curves"]["sft_0"][claim.VALIDATION] == [None, 0.5]


def test_card_names_command_seed_steps_and_metrics(tmp_path):
    row = card.stage_row(write_run(tmp_path / "sft", [30.0, 60.0], **{"loss/image": 0.125}))
    assert list(row.values()) == ["sft", "`xomni train --config=configs/tiny/sft.py`", "3", "20", "7", "1.5", "loss/image 0.125"]


def test_card_prints_what_was_measured(tmp_path):
    for name in ("text", "shapes", "qa"):
        results = {"title": name, "scores": {"right": 0.25}, "categories": {"two": {"score": 0.5, "items": 6}}, "counts": {"outputs": 24}}
        (tmp_path / f"rendered-{name}").mkdir()
        (tmp_path / f"rendered-{name}" / "results.json").write_text(json.dumps(results))
    rows = list(card.ability_rows(tmp_path))
    assert rows[:3] == [("text: right", "0.250", "24"), ("shapes: right", "0.250", "24"), ("shapes: two", "0.500", "6")] and len(rows) == 5


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A finished run of the first stage, as its file says."""
    monkeypatch.chdir(Path(__file__).parents[2])
    config = dataclasses.replace(load_config("configs/tiny/tokenizer.py"), run_dir=str(tmp_path / "tokenizer"))
    for folder in ("model", "checkpoints/800"):
        (tmp_path / "tokenizer" / folder).mkdir(parents=True)
    save_config(config)
    return tmp_path


def test_stages_that_are_as_their_files_say_are_kept(made):
    card.check(made)


@pytest.mark.parametrize(
    "key, value, said", [("steps", 3, "was made with 3 steps, configs/tiny/tokenizer.py says"), ("seed", 5, "config.seed=5")]
)
def test_a_stage_made_otherwise_is_not_done(made, key, value, said, capsys):
    config = json.loads((made / "tokenizer" / "config.json").read_text())
    (made / "tokenizer" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(SystemExit, match="2"):
        card.main(["check", str(made)])
    assert said in (found := capsys.readouterr().err) and "delete" in found and found.count("\n") == 1


def test_card_of_no_runs_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"components": {}}))
    with pytest.raises(ValueError, match="holds no runs"):
        card.card(tmp_path, tmp_path)
