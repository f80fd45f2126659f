"""A class-conditional model learns from images and their classes, then by GRPO with a reward of images and one of whole sets."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.miniature import ROOT, configs, random_params
from tests.rl.pixel_service import pixel_service
from tests.test_metrics import documented, generic
from tests.training.test_stages import assert_same, metrics, params, stop_after
from xomni_jax.core.config import ConfigError
from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.methods.loo_fid import PLAIN, PlainRollouts
from xomni_jax.rl.rollouts import Drawn
from xomni_jax.training.components import export_model
from xomni_jax.training.run import run_stage
from xomni_jax.training.stage import load_config

SIZE = "sizes=((6, 8),)"  # 3 x 4 codes
MESH = ("mesh.data=2", "mesh.fsdp=4")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tokenizer with pictures of three classes, which differ in brightness."""
    folder = tmp_path_factory.mktemp("classes")
    vq = configs()["llamagen_vq"]
    export_model(folder / "vq", {"llamagen_vq": (random_params("llamagen_vq", vq, 0), vq)}, "", {})
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for n in range(24):
        Image.fromarray(rng.integers(80 * (n % 3), 80 * (n % 3) + 40, (6, 8, 3), np.uint8)).save(folder / "images" / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": "a picture", "concept": str(n % 3)})
    (folder / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "classes.txt").write_text("0\n1\n2\n")
    return folder


def c2i(start, run_dir, *overrides):
    sizes = "d_model=32 mlp_dim=48 n_heads=2 n_kv_heads=2 head_dim=16 vocab_size=4 mm_vocab_size=64 image_vocab_size=64 grid_columns=4"
    model = (f"transformer.{field}" for field in (*sizes.split(), "n_language_layers=1"))
    data = f"data.path={start / 'images'}", f"data.{SIZE}", "next_token.rows=8", "next_token.row_length=13", "batch_size=8"
    run = f"run_dir={run_dir}", f"init_from={start / 'vq'}", "steps=30", "log_every=1", "grid_every=30", "optimizer.warmup_steps=1"
    return load_config(ROOT / "configs/methods/llamagen_c2i.py", [*model, *data, *run, *MESH, *overrides])


@pytest.fixture(scope="module")
def learned(start):
    run_stage(c2i(start, start / "c2i"))
    return start / "c2i"


@pytest.fixture(scope="module")
def services():
    with pixel_service("digit") as digit, pixel_service("loo_fid", scope="set") as loo_fid:
        yield digit, loo_fid


def grpo(start, learned, services, run_dir, *overrides):
    rewards = (f"rewards.{service.scorer}.urls=('{service.url}',)" for service in services)
    data = f"data.path={start / 'classes.txt'}", f"data.{SIZE}", "batch_size=8", "grpo.rollouts_per_prompt=4"
    run = (
        f"run_dir={run_dir}",
        f"init_from={learned / 'model'}",
        "steps=3",
        "save_every=1",
        "grid_every=3",
        "optimizer.learning_rate=0.01",
        "optimizer.rates=()",
    )
    return load_config(ROOT / "configs/methods/loo_fid.py", [*rewards, *data, *run, *MESH, *overrides])


def test_classes_are_learned_from_images(start, learned):
    lines = metrics(learned)
    assert lines[-1]["loss/image"] < 0.8 * lines[0]["loss/image"] and lines[-1]["loss/text"] == 0
    assert (learned / "images" / "step_000030.png").is_file()
    model = xomni_jax.load(learned / "model")
    assert [image.size for image in model.generate(["2", "0"], 6, 8, guidance=1.5)] == [(8, 6)] * 2
    for override, said in (
        ("next_token.text=1.0", "generation, understanding and text are"),
        ("data.sizes=((6, 6),)", r"config.data.sizes: This model draws images of 4 columns of codes, not 3; choose another width"),
        ("data.caption=text", "The prompt 'a picture' is no class of this model; give a number from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=said):
            run_stage(c2i(start, start / "refused", override))
    mixed = ("next_token.generation=0.9", "next_token.understanding=0.1")
    with pytest.raises(ConfigError, match="a class-conditional model draws images of numbered classes alone"):
        run_stage(c2i(start, start / "refused", *mixed))


def test_a_class_is_a_prompt_of_one_token(learned):
    tokenizer = xomni_jax.load(learned / "model").tokenizer
    codes = np.arange(12).reshape(3, 4)
    ids, loss, positions = tokenizer.generation_sequence("2", codes)
    assert positions is None
    np.testing.assert_array_equal(ids, [2, *range(4, 16)])
    np.testing.assert_array_equal(loss, [False] + [True] * 12)
    assert tokenizer.generation_sequence("", codes).ids_L[0] == 3, "no class"


def test_rewards_of_images_and_of_sets(start, learned, services, tmp_path, monkeypatch):
    """Each reward has its own advantage; a run that was stopped goes on bit for bit, with what the scorer of sets remembered."""
    run_stage(grpo(start, learned, services, tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    for line in lines:
        assert generic(line) <= documented("grpo")
        assert line["grpo/logp_gap_max"] < 1e-4 and line["grpo/kl"] >= 0 and 0 < line["control/entropy_coef"] <= 4e-3
        assert line["reward/digit/std"] > 0 and line["reward/loo_fid/std"] > 0
    seen = list(services[1].states)
    stop_after(2, monkeypatch)
    again = grpo(start, learned, services, tmp_path / "again")
    assert run_stage(again) is None
    monkeypatch.undo()
    run_stage(again)
    assert metrics(tmp_path / "again") == lines and services[1].states[len(seen) :] == seen
    assert_same(params(tmp_path / "again", "transformer"), params(tmp_path / "run", "transformer"))
    before = xomni_jax.load(learned / "model").params("transformer")
    after = xomni_jax.load(tmp_path / "run" / "model").params("transformer")
    assert not np.array_equal(before["mm_head"]["kernel"], after["mm_head"]["kernel"])


def test_guided_rollouts_teach_the_model_without_guidance(start, learned, services, tmp_path):
    """As in the paper; what they are learned under is neither guided nor truncated."""
    run_stage(grpo(start, learned, services, tmp_path / "plain", "sampling.guidance=3.0", "sampling.top_k=8", "steps=1"))
    (line,) = metrics(tmp_path / "plain")
    # The two updates of a step start from log-probs of the model itself, not from those of the sampler.
    assert line["grpo/logp_gap_max"] > 0.1 and line["grpo/ratio_mean"] == pytest.approx(1, abs=0.05)


def test_plain_rows():
    """The negative prompts and the kept codes are left out, and nothing else."""
    cfg = dataclasses.replace(PLAIN, guidance=2.0, top_k=4)
    own = {f.name: None for f in dataclasses.fields(PlainRollouts)} | {"group": 2, "sampling": cfg}
    made = {"codes": np.arange(6).reshape(1, 2, 3), "logp": np.zeros((1, 2, 3)), "sampling_mask": np.zeros((1, 2, 3, 8), np.uint8)}
    made = jax.tree.map(jax.numpy.asarray, made)
    inputs = np.array([[1]]), np.array([1]), np.zeros((1, 2)), (np.array([[3]]), np.array([1]))
    drawn = Drawn([made], inputs, {}, {}, [], [], {})
    rows, _ = PlainRollouts(**own).rows(drawn, Combined(np.zeros((1, 2)), np.ones((1, 2), bool), None, {}))
    (image,) = rows.drawn
    assert rows.negative is None and image.kept is None and image.spec.sampling == PLAIN
    np.testing.assert_array_equal(image.ids, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(rows.prompts[0], [[1], [1]])
