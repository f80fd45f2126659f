"""Numbers and page from made-up images: no model takes part."""

import json

import numpy as np
import pytest

from tests.evaluation.tiny_model import FakeClient, write_run
from xomni_jax.evaluation.effect import Effect, EffectConfig, Setting
from xomni_jax.evaluation.effect_page import write_report
from xomni_jax.evaluation.effect_summary import summarise, table_text
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.evaluation.judges import RewardsJudge
from xomni_jax.evaluation.measurement import measure
from xomni_jax.evaluation.suites.rendered import heldout_signs


class NoisyReader(FakeClient):
    """Reads right with a chance that the prompt names: "... 0.7"."""

    def __init__(self, key="exact", seed=0):
        super().__init__(key)
        self.rng = np.random.default_rng(seed)

    def score(self, image, item):
        """Right, or with two letters exchanged."""
        right = self.rng.random() < item["chance"]
        score = super().score(np.zeros((1, 1, 3)), item)
        text = item["targets"]["text"][0]
        detail = {self.key: right, "text": text if right else text[1:] + "X"}
        return type(score)(1.0 if right else float(self.rng.random() * 0.8), None, detail)


def made_up(signs, chance, samples, clients, noise, rng):
    """A measurement of blurred real images that read right with the given chance."""
    images = np.repeat(signs.images[:, None], samples, axis=1).astype(np.float64)
    images = (images + rng.normal(0, noise, images.shape)).clip(0, 255).astype(np.uint8)
    questions = [[{"prompt": c, "targets": t, "chance": chance}] for c, t in zip(signs.captions, signs.targets) for _ in range(samples)]
    replies = iter(RewardsJudge(clients, {}).ask(images.reshape(-1, *images.shape[2:]), questions))
    agreement = rng.binomial(32, 0.8, images.shape[:2]) / 32
    return measure("made up", images, [[next(replies)[0] for _ in range(samples)] for _ in signs.captions], agreement)


def made_up_effect(folder, prompts=24, samples=16, second=True):
    """SFT reads right 0.25, RL 0.75 of the time."""
    write_run(folder / "run", 60)
    rng, signs = np.random.default_rng(0), heldout_signs(prompts, (32, 64), (3, 6), 0)
    clients = {"ocr": NoisyReader(), "shapes": NoisyReader("colour_exact", 1)} | ({"second": NoisyReader(seed=2)} if second else {})
    cell = lambda chance, n, noise=25: made_up(signs, chance, n, clients, noise, rng)  # noqa: E731
    config = EffectConfig("sft", "run/model", str(folder / "run"), str(folder), prompts=prompts, samples=samples)
    settings = {}
    reconstruction = cell(0.8, 1, 10)
    for name in ("guidance_off", "guidance_on"):
        sft = cell(0.25, samples)
        sweep = {1.0: sft, 0.7: cell(0.3, 4), 0.5: cell(0.4, 4), 0.3: cell(0.38, 4), 0.0: cell(0.35, 1)}
        settings[name] = Setting(reconstruction, sft, cell(0.75, 4, 15), sweep)
    return Effect(config, signs, read_run(folder / "run"), cell(0.97, 1, 0), settings)


SECONDS = {"first_image_seconds": 12.5, "wall_seconds": 600.0, "evaluation_seconds": 90.0}


def test_summary(tmp_path):
    report = summarise(made_up_effect(tmp_path), SECONDS)
    off, c = report["guidance_off"], report["comparisons"]["guidance_off"]
    assert list(off) == ["reconstruction", "sft", "sft_best_of_2", "sft_best_of_4", "sft_best_of_8", "sft_best_of_16", "rl"]
    words = [off[name]["word_accuracy"] for name in ("sft", "sft_best_of_2", "sft_best_of_4", "sft_best_of_8", "sft_best_of_16")]
    assert words == sorted(words) and words[0] == pytest.approx(0.25, abs=0.06)
    # The pick sees words and colour alike, each right a quarter of the time, so best-of-4 stays below RL and best-of-16 does not.
    held = [n for n, w in zip((1, 2, 4, 8, 16), words) if w < off["rl"]["word_accuracy"]]
    assert report["rl_holds_up_to_best_of"] == held[-1] and held[-1] >= 2
    ratio = c["word_accuracy_ratio"]["rl_to_sft"]
    assert ratio["value"] == pytest.approx(off["rl"]["word_accuracy"] / off["sft"]["word_accuracy"])
    assert ratio["ci95"][0] < ratio["value"] < ratio["ci95"][1]
    assert c["sft_best_temperature"] in (0.5, 0.3, 0.0)
    difference = c["rl_minus"]["sft"]["word_accuracy"]
    assert difference["value"] == pytest.approx(off["rl"]["word_accuracy"] - off["sft"]["word_accuracy"])
    assert report["failures"]["guidance_off/sft"] == {"images": 384, "ocr": 0, "shapes": 0, "second": 0}
    assert "oracle" in report["notes"][0] and "one RL sample reads right" in table_text(report)
    json.dumps(report, allow_nan=False)


def test_an_absent_reader_is_null_with_a_sentence(tmp_path):
    effect = made_up_effect(tmp_path, prompts=4, samples=4, second=False)
    report = summarise(effect, SECONDS)
    row = report["guidance_off"]["rl"]
    assert row["second_reader_accuracy"] is None and row["ci95"]["second_reader_accuracy"] is None
    assert any("no second reader was given" in note for note in report["notes"])
    assert "sft_best_of_4" in report["guidance_on"] and "sft_best_of_8" not in report["guidance_on"]
    assert "no second reader was given" in write_report(effect, report, tmp_path / "report.html").read_text()


def test_page_stands_alone(tmp_path):
    effect = made_up_effect(tmp_path)
    page = write_report(effect, summarise(effect, SECONDS), tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/png;base64,") == 2 * 12 * 10 and "oracle" in page
    for loads in ("<link", "<script", "@import", "url(", 'src="http', "<iframe"):
        assert loads not in page
    assert page.count("<svg") == 2 + 6 - 1 + 2  # words, training (no spread of rewards was logged), temperatures
