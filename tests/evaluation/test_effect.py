"""The comparison on an untrained tiny model with scorers that read the pixels."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.evaluation.tiny_model import FakeClient, fake_clients, make_models, write_run
from xomni_jax.data.rendered import render_example
from xomni_jax.evaluation import drawing, effect as effect_module
from xomni_jax.evaluation.cells import Cell, EvaluationError, measure
from xomni_jax.evaluation.drawing import Drawing, heldout_signs
from xomni_jax.evaluation.effect import EffectConfig, open_services, run_effect
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.evaluation.pictures import colour_entropy, colour_histogram, edge_density
from xomni_jax.evaluation.report import write_report
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.training.grpo import image_statistics


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories and a run, made once."""
    return make_models(tmp_path_factory.mktemp("effect"))


def config(models, out, **changes):
    """3 prompts, 2 samples, chunks that do not divide."""
    base = dict(prompts=3, samples=2, rl_samples=2, sweep_samples=2, temperatures=(1.0, 0.0), chunk=4)
    return EffectConfig(str(models / "sft"), str(models / "run/model"), str(models / "run"), str(out), **base | changes)


def test_report_and_resume(models, tmp_path, monkeypatch):
    cfg = config(models, tmp_path)
    effect, report = run_effect(cfg, fake_clients(), first_image_seconds=3.5)
    assert report["heldout_prompts"] == 3 and report["grpo_steps"] == 5 and report["first_image_seconds"] == 3.5
    assert report["step_seconds"] == pytest.approx({"rollout": 0.3, "decode": 0.3, "reward": 0.2, "update": 0.4})
    assert report["settings"]["selection_weights"] == {"ocr": 1.0, "shapes": 0.5}
    for name in ("guidance_off", "guidance_on"):
        assert list(report[name]) == ["reconstruction", "sft", "sft_best_of_2", "rl"]
        for row in report[name].values():
            assert set(row) == {"ocr_reward", "word_accuracy", "colour_accuracy", "second_reader_accuracy", "ci95"}
            assert row["ci95"]["ocr_reward"][0] <= row["ocr_reward"] <= row["ci95"]["ocr_reward"][1]
        assert report[name]["sft_best_of_2"]["ocr_reward"] >= report[name]["sft"]["ocr_reward"]
        assert [e["temperature"] for e in report["sft_temperature_sweep"][name]] == [1.0, 0.0]
        assert 0 <= report["image_statistics"][name]["rl"]["reencode_agreement"] <= 1
    assert report["guidance_off"]["reconstruction"] == report["guidance_on"]["reconstruction"]
    off, on = (effect.settings[name] for name in ("guidance_off", "guidance_on"))
    assert (off.sft.images != on.sft.images).any() and (off.sft.images != off.rl.images).any()
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))

    # Nothing is drawn again; one lost cell is, and comes out the same.
    (tmp_path / "cells/guidance_off-rl.npz").unlink()
    made = []
    monkeypatch.setattr(effect_module, "measure", lambda name, *a, **k: made.append(name) or measure(name, *a, **k))
    again, second = run_effect(cfg, fake_clients())
    assert made == ["guidance_off-rl"] and second["guidance_off"] == report["guidance_off"]
    np.testing.assert_array_equal(again.settings["guidance_off"].rl.images, off.rl.images)

    page = write_report(effect, report, tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/png;base64,") > 10 and "oracle" in page
    assert not any(f"{attribute}=\"{scheme}" in page for attribute in ("src", "href") for scheme in ("http", "/", "file"))


def test_samples_do_not_depend_on_how_many_are_drawn(models):
    signs = heldout_signs(3, (32, 64), (3, 6), 0)
    studio = Drawing(models / "sft", models / "run/model", signs, seed=4, chunk=4)
    sampling = SamplingConfig(1.0, 0, 1.0, 0.0)
    three, one = studio.codes("sft", sampling, 3), studio.codes("sft", sampling, 1)
    np.testing.assert_array_equal(three[:, :1], one)
    images = np.concatenate([c[0] for c in studio.pictures(three)])
    alone = np.concatenate([c[0] for c in studio.pictures(one)])
    # The same codes and noise give the same picture wherever they stand in a chunk; one level is float rounding.
    assert np.abs(images[::3].astype(int) - alone).max() <= 1


def test_heldout_signs_are_different():
    signs = heldout_signs(20, (32, 64), (3, 6), 1)
    assert len(set(signs.captions)) == 20 and signs.images.shape == (20, 32, 64, 3)
    assert all(3 <= len(t["text"][0]) <= 6 for t in signs.targets) and len(signs.items(3)) == 60


def cell_of(rng, clients, prompts=4, samples=3):
    """A cell of noise."""
    images = rng.integers(0, 256, (prompts * samples, 16, 24, 3)).astype(np.uint8)
    items = [{"prompt": "p", "targets": {"text": ["AB"]}}] * len(images)
    chunks = [(images[i : i + 5], None, None) for i in range(0, len(images), 5)]
    return measure("noise", chunks, items, prompts, clients)


def test_a_failed_score_is_left_out_and_counted(rng, tmp_path):
    cell = cell_of(rng, fake_clients(fail_every=6))
    assert cell.failures == {"ocr": 2, "shapes": 0, "second": 0}
    assert np.isnan(cell.metrics["ocr_reward"]).sum() == np.isnan(cell.metrics["word_accuracy"]).sum() == 2
    assert np.isnan(cell.selection({"ocr": 1.0, "shapes": 1.0})).sum() == 2 and np.isfinite(cell.selection({"shapes": 1.0})).all()
    cell.save(tmp_path / "a.npz", "key")
    back = Cell.load(tmp_path / "a.npz", "key")
    np.testing.assert_array_equal(back.metrics["ocr_reward"], cell.metrics["ocr_reward"])
    assert back.failures == cell.failures and (back.texts["ocr"] == cell.texts["ocr"]).all()
    assert Cell.load(tmp_path / "a.npz", "other") is None
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    assert Cell.load(tmp_path / "a.npz", "key") is None


def test_a_broken_service_stops_the_evaluation(rng):
    with pytest.raises(EvaluationError, match="noise: 6 of 12 pictures could not be scored by ocr .no answer.; mend the service"):
        cell_of(rng, {"ocr": FakeClient(fail_every=2)})
    with pytest.raises(EvaluationError, match="trained on .quality. was measured here"):
        cell_of(rng, fake_clients()).selection({"quality": 1.0})


def test_picture_statistics_are_those_of_training(rng):
    images = (rng.integers(0, 256, (5, 16, 24, 3)) // np.array([1, 2, 4])).astype(np.uint8)
    expected = image_statistics(images)
    assert edge_density(images).mean() == pytest.approx(expected["image/edge_density"], rel=1e-5)
    assert colour_entropy(colour_histogram(images).mean(0)) == pytest.approx(expected["image/colour_entropy"], rel=1e-6)


def test_run_files(tmp_path):
    write_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.steps == 5 and run.weights == {"ocr": 1.0, "shapes": 0.5}
    assert len(run.curve("perf/update_s")[0]) == 4
    with pytest.raises(EvaluationError, match="no metrics.jsonl here; give the run directory"):
        read_run(tmp_path)


def test_mistakes_are_named(models, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="guidance=1 is the setting without guidance"):
        config(models, tmp_path, guidance=1.0)
    with pytest.raises(EvaluationError, match="no OCR service is given; start one with"):
        with open_services({}):
            pass
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="only 1 different held-out signs of 3 to 3 characters"):
        patch.setattr(drawing, "render_example", lambda seed, index, config: render_example(seed, 0, config))
        heldout_signs(2, (32, 64), (3, 3), 0)
    other = tmp_path / "other"
    shutil.copytree(models / "run/model", other)
    described = json.loads((other / "model.json").read_text())
    described["components"]["mmdit"]["note"] = {"step": 7}
    (other / "model.json").write_text(json.dumps(described))
    with pytest.raises(EvaluationError, match="its mmdit is not that of"):
        run_effect(dataclasses.replace(config(models, tmp_path), rl=str(other)), fake_clients())
