"""The comparison with scorers that read the pixels; the models stand in one test, where they are untrained."""

import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.tiny_model import FakeClient, fake_clients, make_models, write_run
from xomni_jax.data import rendered
from xomni_jax.data.rendered import render_example
from xomni_jax.evaluation import effect as effect_module
from xomni_jax.evaluation.effect import EffectConfig, PolicySampler, open_services
from xomni_jax.evaluation.effect_page import write_report
from xomni_jax.evaluation.effect_summary import run_effect, table_text
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.evaluation.judges import RewardsJudge
from xomni_jax.evaluation.measurement import colour_entropy, colour_histogram, edge_density, measure
from xomni_jax.evaluation.outputs import Generation
from xomni_jax.evaluation.run import EvalConfig, evaluate
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites.rendered import HeldoutSigns, heldout_signs
from xomni_jax.inference import InferenceConfig
from xomni_jax.rl.image_statistics import image_sums, join_statistics
from xomni_jax.sampling.decoder import DecodeConfig


def config(folder, out, **changes):
    """3 prompts, 2 samples, chunks that do not divide."""
    base = dict(prompts=3, samples=2, rl_samples=2, sweep_samples=2, temperatures=(1.0, 0.5, 0.0), chunk=4)
    return EffectConfig(str(folder / "sft"), str(folder / "run/model"), str(folder / "run"), str(out), **base | changes)


class NoiseSampler:
    """Stands for the models: codes and images are noise that depends on policy and sampling."""

    grid, num_data_shards, description = (lambda self, height, width: (4, 8)), 1, {}
    mesh = SimpleNamespace(shape={"fsdp": 1, "tensor": 1})
    decode_config, tokenizer = DecodeConfig(), SimpleNamespace(generation_prompt=lambda prompt, *grid: prompt.split())
    check_prompts, decoder_tokens = lambda self, prompts: None, lambda self, prompt: 3

    def __init__(self, sft, rl):
        self.model, self.policy = self, ""

    def with_policy(self, policy):
        self.policy = policy
        return self

    def sample_codes(self, prompts, grid, keys, sampling, length):
        seed = [len(self.policy), int(10 * sampling.temperature), int(10 * sampling.guidance), keys.shape[1]]
        return {"codes": jnp.asarray(np.random.default_rng(seed).integers(0, 512, (*keys.shape, *grid)))}

    def noise(self, keys, grid):
        return np.zeros(len(keys))

    def decode_images(self, codes, prompts, noise):
        images = [np.random.default_rng(np.asarray(c).ravel()).integers(0, 256, (32, 64, 3)) for c in codes]
        return jnp.asarray(np.stack(images), jnp.uint8)

    def encode_pixels(self, pixels):
        return jnp.asarray([np.random.default_rng(int(abs(p).sum())).integers(0, 512, (4, 8)) for p in pixels])


def test_report_and_resume(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    for name in ("sft", "run/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.json").write_text('{"format": 1, "components": {}}')
    monkeypatch.setattr(effect_module, "PolicySampler", NoiseSampler)
    made = []
    note = lambda config, *a, **k: (made.append(config.out.name) if config.phase == "generate" else None) or evaluate(config, *a, **k)  # noqa: E731
    monkeypatch.setattr(effect_module, "evaluate", note)
    cfg = config(tmp_path, tmp_path / "out")
    _, report = run_effect(cfg, fake_clients(), {"ocr": "1"}, first_image_seconds=3.5)
    assert len(made) == 1 + 2 * 4
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
        assert report["image_statistics"][name]["rl"]["reencode_agreement"] < 0.1  # of noise
    assert report["guidance_off"]["reconstruction"] == report["guidance_on"]["reconstruction"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report))

    # An interrupted evaluation goes on; another version of a service makes everything again.
    made.clear()
    shutil.rmtree(tmp_path / "out/cells/guidance_off-rl")
    _, second = run_effect(cfg, fake_clients(), {"ocr": "1"})
    assert made == ["guidance_off-rl"] and second["guidance_off"] == report["guidance_off"]
    made.clear()
    run_effect(cfg, fake_clients(), {"ocr": "2"})
    assert len(made) == 9
    # A new policy leaves SFT's measurements alone.
    made.clear()
    (tmp_path / "run/model/model.json").write_text('{"format": 1, "components": {} }')
    run_effect(cfg, fake_clients(), {"ocr": "2"})
    assert made == ["guidance_off-rl", "guidance_on-rl"]
    # A broken service is one sentence, whether it is noticed before or after the first images are drawn; its replies are not kept.
    with pytest.raises(SuiteError, match=": 3 of 3 images could not be scored by ocr .no answer.; fix the service"):
        run_effect(cfg, {"ocr": FakeClient(fail_every=1)}, {"ocr": "3"})
    assert not (tmp_path / "out/cells/real/results.json").exists()
    _, again = run_effect(cfg, {"ocr": FakeClient()}, {"ocr": "3"})
    assert again["guidance_on"]["rl"]["ocr_reward"] == report["guidance_on"]["rl"]["ocr_reward"]
    # Without a second setting of guidance, page and table are of the first alone.
    effect, alone = run_effect(config(tmp_path, tmp_path / "off", guidance=1.0), fake_clients(), {"ocr": "1"})
    assert alone["guidance_off"] == report["guidance_off"] and "guidance_on" not in alone and "Guidance on" not in table_text(alone)
    assert "The same with guidance" not in write_report(effect, alone, tmp_path / "off.html").read_text()


def test_policies(tmp_path):
    """With real, untrained models: what is random, what is shared, and that another decoder is refused."""
    models, signs = make_models(tmp_path), heldout_signs(3, (32, 64), (3, 6), 0)
    sampler = PolicySampler(models / "sft", models / "run/model")

    def draw(policy, samples, reconstruct=False):
        suite, inference = HeldoutSigns(signs, samples), InferenceConfig(top_k=0, min_p=0.0, batch=3, decode_batch=4)
        how = {"repeats_per_call": 1, "reconstruct": reconstruct, "reencode": True}  # one sample of each prompt at a time
        generation = Generation(sampler.with_policy(policy), suite, EvalConfig(suite, "", inference=inference, seed=4, **how))
        (batch,) = generation.draw(suite.load(tmp_path))
        assert [item.prompt for item, _, _ in batch] == list(signs.captions)
        agreement = np.array([more["agreement"] for _, _, more in batch])
        return np.stack([[np.asarray(image) for image in images] for _, images, _ in batch]), agreement

    (two, agreement), (one, _), (other, _) = draw("sft", 2), draw("sft", 1), draw("rl", 1)
    assert two.shape == (3, 2, 32, 64, 3) and agreement.shape == (3, 2) and (agreement >= 0).all() and (agreement <= 1).all()
    assert (two[:, 0] != two[:, 1]).any() and (one != other).any()
    # Sample 0 stands elsewhere in a chunk when drawn alone; noise and codes are the same. One level is float rounding.
    assert np.abs(two[:, :1].astype(int) - one).max() <= 1
    assert draw("sft", 1, reconstruct=True)[0].shape == (3, 1, 32, 64, 3)

    path = models / "run/model/model.json"
    described = json.loads(path.read_text())
    described["components"]["mmdit"]["note"] = {"step": 7}
    path.write_text(json.dumps(described))
    with pytest.raises(SuiteError, match="its mmdit is not that of"):
        PolicySampler(models / "sft", models / "run/model")


def test_heldout_signs_are_different():
    signs = heldout_signs(20, (32, 64), (3, 6), 1)
    assert len(set(signs.captions)) == 20 and signs.images.shape == (20, 32, 64, 3)
    assert all(3 <= len(t["text"][0]) <= 6 for t in signs.targets) and all(image.shape == (32, 64, 3) for image in signs.images)


def measured(rng, clients, prompts=4, samples=3):
    """A measurement of noise."""
    images = rng.integers(0, 256, (prompts, samples, 16, 24, 3)).astype(np.uint8)
    questions = [[{"prompt": "p", "targets": {"text": ["AB"]}}]] * samples
    judge = RewardsJudge(clients, {})
    return measure("noise", images, [[reply for (reply,) in judge.ask(list(row), questions)] for row in images])


def test_a_failed_score_is_left_out_and_counted(rng):
    found = measured(rng, fake_clients(fail_every=6))
    assert found.failures == {"ocr": 2, "shapes": 0, "second": 0}
    assert np.isnan(found.metrics["ocr_reward"]).sum() == np.isnan(found.metrics["word_accuracy"]).sum() == 2
    assert np.isnan(found.selection({"ocr": 1.0, "shapes": 1.0})).sum() == 2 and np.isfinite(found.selection({"shapes": 1.0})).all()


def test_a_broken_service_stops_the_evaluation(rng):
    with pytest.raises(SuiteError, match="noise: 6 of 12 images could not be scored by ocr .no answer.; fix the service"):
        measured(rng, {"ocr": FakeClient(fail_every=2)})
    with pytest.raises(SuiteError, match="trained on .quality. was measured here"):
        measured(rng, fake_clients()).selection({"quality": 1.0})


def test_image_statistics_are_those_of_training(rng):
    images = (rng.integers(0, 256, (5, 16, 24, 3)) // np.array([1, 2, 4])).astype(np.uint8)
    expected = join_statistics([image_sums(images)])
    assert edge_density(images).mean() == pytest.approx(expected["image/edge_density"], rel=1e-5)
    assert colour_entropy(colour_histogram(images).mean(0)) == pytest.approx(expected["image/colour_entropy"], rel=1e-6)


def test_run_files(tmp_path):
    write_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.steps == 5 and run.weights == {"ocr": 1.0, "shapes": 0.5}
    assert len(run.curve("perf/update_s")[0]) == 4
    with pytest.raises(SuiteError, match="no metrics.jsonl here; give the run directory"):
        read_run(tmp_path)


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="prompts=1 gives no interval"):
        config(tmp_path, tmp_path, prompts=1)
    with pytest.raises(SuiteError, match="no OCR service is given; start one with"):
        with open_services({}):
            pass
    monkeypatch.setattr(rendered, "render_example", lambda seed, index, config: render_example(seed, 0, config))
    with pytest.raises(ValueError, match="only 1 different held-out signs of 3 to 3 characters"):
        heldout_signs(2, (32, 64), (3, 3), 0)
