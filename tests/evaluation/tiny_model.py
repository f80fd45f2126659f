"""A complete, untrained model of the tiny presets, small enough to make in a test; and scorers that need no service."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import Future

import jax
import numpy as np
from flax.linen import meta

from xomni_jax.checkpoint.store import copy_components, save_component, save_settings
from xomni_jax.data.preprocess import trained_limits
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer
from xomni_jax.models.registry import init_params
from xomni_jax.rewards.client import Score
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER

CONFIGS = {
    "transformer": transformer.PRESETS["tiny"],
    "siglip_vq": siglip_vq.PRESETS["tiny"],
    "mmdit": dataclasses.replace(mmdit.PRESETS["tiny"], n_single=1, unroll=1),
    "autoencoder": autoencoder.PRESETS["identity-4"],
    "t5": dataclasses.replace(text_encoders.T5_PRESETS["tiny"], n_layers=1),
    "clip": dataclasses.replace(text_encoders.CLIP_PRESETS["tiny"], n_layers=1),
}


def random_params(name, cfg, seed):
    """Noise in the shapes of a component, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    shapes = meta.unbox(jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0))))
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)


def make_models(folder):
    """SFT and RL model directories that differ in the transformer alone, and a GRPO run's files."""
    for number, (name, cfg) in enumerate(CONFIGS.items()):
        save_component(folder / "sft", name, random_params(name, cfg, number), cfg)
    save_settings(
        folder / "sft", decode=DecodeConfig(steps=2, text_length=32, pooled_length=32), preprocess=trained_limits(((32, 64), (32, 128)), 8)
    )
    shutil.copytree(TINY_TOKENIZER, folder / "sft" / "tokenizer")
    copy_components(folder / "sft", folder / "run" / "model", tuple(n for n in CONFIGS if n != "transformer"))
    cfg = CONFIGS["transformer"]
    save_component(folder / "run" / "model", "transformer", random_params("transformer", cfg, 9), cfg)
    write_run(folder / "run")
    return folder


def write_run(run, steps=5):
    """metrics.jsonl and config.json as the GRPO stage leaves them, the last line cut off."""
    run.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        grow = step / steps
        line = {
            "step": step,
            "reward/ocr/mean": 0.2 + 0.5 * grow,
            "reward/shapes/mean": 0.9,
            "reward/total/mean": 1.1 + 0.5 * grow,
        }
        line |= {"grpo/kl": 0.01 * grow, "grpo/entropy": 2 - grow, "image/edge_density": 30.0, "image/colour_entropy": 3.0}
        line |= {
            "perf/rollout_s": 0.1 * step,
            "perf/decode_s": 0.3,
            "perf/reward_wait_s": 0.2,
            "perf/update_s": None if step == 1 else 0.4,
        }
        lines.append(json.dumps(line))
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "rew')
    rewards = {"ocr": {"weight": 1.0}, "shapes": {"weight": 0.5}, "quality": {"weight": None}}
    (run / "config.json").write_text(json.dumps({"rewards": rewards}))


class FakeClient:
    """Scores from the pixels, so that other images get other scores; every `fail_every`-th image fails."""

    def __init__(self, key="exact", fail_every=0):
        self.key, self.fail_every, self.seen = key, fail_every, 0

    def score_async(self, images, items):
        """Done at once."""
        done: Future = Future()
        done.set_result([self.score(image, item) for image, item in zip(images, items, strict=True)])
        return done

    def wait(self, future):
        """As the real client."""
        return future.result()

    def score(self, image, item):
        """The mean of the pixels, folded."""
        self.seen += 1
        if self.fail_every and self.seen % self.fail_every == 0:
            return Score(None, "no answer")
        value = float(np.asarray(image, np.float64).mean()) % 1.0
        text = item["targets"]["text"][0]
        return Score(value, None, {self.key: value > 0.5, "text": text if value > 0.5 else text[::-1]})


def fake_clients(fail_every=0):
    """The three roles."""
    return {"ocr": FakeClient(fail_every=fail_every), "shapes": FakeClient("colour_exact"), "second": FakeClient()}
