"""The comparison with scorers that read the pixels; the models stand in one test, where they are untrained."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.tiny_model import FakeClient, fake_clients, make_models, write_run
from xomni_jax.data.rendered import render_example
from xomni_jax.evaluation import drawing
from xomni_jax.evaluation import effect as effect_module
from xomni_jax.evaluation.cells import Cell, EvaluationError, measure
from xomni_jax.evaluation.drawing import Drawing, heldout_signs
from xomni_jax.evaluation.effect import EffectConfig, open_services, run_effect
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.evaluation.images import colour_entropy, colour_histogram, edge_density
from xomni_jax.rl.image_statistics import image_statistics
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.logits import SamplingConfig


def config(folder, out, **changes):
    """3 prompts, 2 samples, chunks that do not divide."""
    base = dict(prompts=3, samples=2, rl_samples=2, sweep_samples=2, temperatures=(1.0, 0.5, 0.0), chunk=4)
    return EffectConfig(str(folder / "sft"), str(folder / "run/model"), str(folder / "run"), str(out), **base | changes)


class NoiseDrawing:
    """Stands for the models: codes and images are noise that depends on policy and sampling."""

    def __init__(self, sft, rl, signs, seed, chunk):
        self.signs, self.chunk, self.model = signs, chunk, SimpleNamespace(decode_config=DecodeConfig())

    def codes(self, policy, sampling, samples):
        seed = [len(policy), int(10 * sampling.temperature), int(10 * sampling.guidance)]
        return np.random.default_rng(seed).integers(0, 512, (len(self.signs.captions), samples, 4, 8))

    def real_codes(self):
        return np.random.default_rng(0).integers(0, 512, (len(self.signs.captions), 1, 4, 8))

    def real_images(self):
        yield self.signs.images, None, None

    def images(self, codes):
        flat = codes.reshape(-1, 4, 8)
        for start in range(0, len(flat), self.chunk):
            part = flat[start : start + self.chunk]
            images = np.random.default_rng(part.ravel()).integers(0, 256, (len(part), 32, 64, 3)).astype(np.uint8)
            yield images, part, np.where(part > 100, part, 0)


def test_report_and_resume(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    for name in ("sft", "run/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.json").write_text('{"format": 1, "components": {}}')
    monkeypatch.setattr(effect_module, "Drawing", NoiseDrawing)
    made = []
    monkeypatch.setattr(effect_module, "measure", lambda name, *a, **k: made.append(name) or measure(name, *a, **k))
    cfg = config(tmp_path, tmp_path / "out")
    effect, report = run_effect(cfg, fake_clients(), {"ocr": "1"}, first_image_seconds=3.5)
    assert len(made) == 2 + 2 * 4
    assert report["heldout_prompts"] == 3 and report["grpo_steps"] == 5 and report["first_image_seconds"] == 3.5
    assert report["step_seconds"] == pytest.approx({"rollout": 0.3, "decode": 0.3, "reward": 0.2, "update": 0.4})
    assert report["settings"]["selection_weights"] == {"ocr": 1.0, "shapes": 0.5}
    for name in ("guidance_off", "guidance_on"):
        assert list(report[name]) == ["reconstruction", "sft", "sft_best_of_2", "rl"]
        for row in report[name].values():
            assert set(row) == {"ocr_reward", "word_accuracy", "colour_accuracy", "second_reader_accuracy", "ci95"}
            assert row["ci95"]["ocr_reward"][0] <= row["ocr_reward"] <= row["ci95"]["ocr_reward"][1]
        assert report[name]["sft_best_of_2"]["ocr_reward"] >= report[name]["sft"]["ocr_reward"]
        # Greedy samples of a prompt are one and the same image.
        assert [(e["temperature"], e["samples"]) for e in report["sft_temperature_sweep"][name]] == [(1.0, 2), (0.5, 2), (0.0, 1)]
        assert report["image_statistics"][name]["rl"]["reencode_agreement"] == pytest.approx(0.8, abs=0.1)
    assert report["guidance_off"]["reconstruction"] == report["guidance_on"]["reconstruction"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report))

    # An interrupted evaluation goes on; another version of a service makes everything again.
    made.clear()
    (tmp_path / "out/cells/guidance_off-rl.npz").unlink()
    _, second = run_effect(cfg, fake_clients(), {"ocr": "1"})
    assert made == ["guidance_off-rl"] and second["guidance_off"] == report["guidance_off"]
    made.clear()
    run_effect(cfg, fake_clients(), {"ocr": "2"})
    assert len(made) == 10
    # A new policy leaves SFT's cells alone.
    made.clear()
    (tmp_path / "run/model/model.json").write_text('{"format": 1, "components": {} }')
    run_effect(cfg, fake_clients(), {"ocr": "2"})
    assert made == ["guidance_off-rl", "guidance_on-rl"]


def test_drawing(tmp_path, monkeypatch):
    """With real, untrained models: what is random, what is shared, and that another decoder is refused."""
    models = make_models(tmp_path)
    signs = heldout_signs(3, (32, 64), (3, 6), 0)
    monkeypatch.setattr(drawing, "SAMPLER_ROWS", 5)  # one sample of each prompt at a time
    studio, sampling = Drawing(models / "sft", models / "run/model", signs, seed=4, chunk=4), SamplingConfig(1.0, 0, 1.0, 0.0)
    two, one, other = studio.codes("sft", sampling, 2), studio.codes("sft", sampling, 1), studio.codes("rl", sampling, 1)
    assert two.shape == (3, 2, 4, 8) and (two[:, 0] != two[:, 1]).any() and (one != other).any()
    np.testing.assert_array_equal(two[:, :1], one)
    images, codes, again = (np.concatenate(x) for x in zip(*studio.images(two)))
    alone = np.concatenate([c[0] for c in studio.images(one)])
    assert images.shape == (6, 32, 64, 3) and again.shape == codes.shape == (6, 4, 8)
    # Sample 0 stands elsewhere in a chunk when drawn alone; noise and codes are the same. One level is float rounding.
    assert np.abs(images[::2].astype(int) - alone).max() <= 1
    assert studio.real_codes().shape == (3, 1, 4, 8)

    path = models / "run/model/model.json"
    described = json.loads(path.read_text())
    described["components"]["mmdit"]["note"] = {"step": 7}
    path.write_text(json.dumps(described))
    with pytest.raises(EvaluationError, match="its mmdit is not that of"):
        Drawing(models / "sft", models / "run/model", signs, seed=4)


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
    with pytest.raises(EvaluationError, match="noise: 6 of 12 images could not be scored by ocr .no answer.; mend the service"):
        cell_of(rng, {"ocr": FakeClient(fail_every=2)})
    with pytest.raises(EvaluationError, match="trained on .quality. was measured here"):
        cell_of(rng, fake_clients()).selection({"quality": 1.0})


def test_image_statistics_are_those_of_training(rng):
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


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="guidance=1 is the setting without guidance"):
        config(tmp_path, tmp_path, guidance=1.0)
    with pytest.raises(EvaluationError, match="no OCR service is given; start one with"):
        with open_services({}):
            pass
    monkeypatch.setattr(drawing, "render_example", lambda seed, index, config: render_example(seed, 0, config))
    with pytest.raises(ValueError, match="only 1 different held-out signs of 3 to 3 characters"):
        heldout_signs(2, (32, 64), (3, 3), 0)
