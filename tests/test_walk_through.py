"""The commands of the walk-through of configs/emoji, on a few drawings in the layout of `xomni data make`.

Compiling takes nearly all of the time, so that fine-tuning alone makes its updates. The other stages load their batches and hand on the
model that they start with; tests/training/test_stages.py makes their updates.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.miniature import CHANGES, DECODE, PREPROCESS, ROOT, SECTIONS
from xomni_jax.cli.main import main
from xomni_jax.core.config import as_dict, flat
from xomni_jax.data.images import read_image
from xomni_jax.evaluation import outputs
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training import decoder, pretrain, tokenizer
from xomni_jax.training import run as training_run
from xomni_jax.training.loop import train
from xomni_jax.training.stage import load_config
from xomni_jax.training.state import new_state

STAGES = ("tokenizer", "decoder", "pretrain", "sft")
FOLDER = ROOT / "configs" / "emoji"
SMALL = {"steps": 2, "batch_size": 4, "log_every": 1, "grid_every": 0, "data": {"sizes": ((16, 16),)}}
SMALL |= {"optimizer": {**CHANGES["optimizer"], "name": "adamw"}, "tokenizer": CHANGES["tokenizer"]}
SMALL |= {"preprocess": PREPROCESS, "next_token": {"rows": 4, "row_length": 128}, "decode": DECODE}


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """The folder of the walk-through, with six drawings of two colours by two artists."""

    def train_shortly(run, stage, *rest):
        without = dataclasses.replace(stage, step=lambda state, batch, number: (state, {}))
        return train(run, stage if run.stage == "sft" else without, *rest)

    def drawn_state(*args):
        _, shapes = new_state(*args)
        rng = np.random.default_rng(0)

        def draw(path, x):  # no zero among the parameters, and nothing else in the optimizer
            values = float(path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape)
            return jax.device_put(values.astype(x.dtype), x.sharding)

        state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
        return lambda: state.replace(params=jax.tree_util.tree_map_with_path(draw, shapes.params)), shapes

    for module in (tokenizer, decoder, pretrain):
        monkeypatch.setattr(module, "new_state", drawn_state)
    monkeypatch.setattr(training_run, "train", train_shortly)
    monkeypatch.chdir(tmp_path)
    # One device: what several do is tested elsewhere, and takes longer to compile.
    for module, name in ((training_run, "policy_mesh"), (outputs, "make_mesh")):
        monkeypatch.setattr(module, name, lambda _: make_mesh({}, jax.devices()[:1]))
    for split, codes in (("train", range(4)), ("heldout_concepts", (4,)), ("heldout_artist", (5,))):
        folder = tmp_path / "data" / "emoji" / split
        folder.mkdir(parents=True)
        rows = []
        for code in codes:
            image = Image.new("RGB", (16, 16), "white")
            ImageDraw.Draw(image).ellipse((2, 2, 13, 13), fill=("red", "blue")[code % 2])
            image.save(folder / f"noto-{code}.png")
            for question, answer in (("what is drawn?", f"thing {code}"), ("画的是什么？", "东西")):
                rows.append({"file_name": f"noto-{code}.png", "text": f"thing {code}", "question": question, "answer": answer})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return tmp_path


def small(stage):
    """The options that cut a stage down, those of its keys that there are."""
    known = flat(as_dict(load_config(FOLDER / f"{stage}.py")))
    wanted = flat({**SECTIONS, **SMALL})
    return [f"--config.{key}={value}" for key, value in wanted.items() if key in known]


def test_own_images_through_every_stage(emoji, capsys):
    for stage in STAGES:
        assert main(["train", f"--config={FOLDER / stage}.py", *small(stage)]) == 0
        run = emoji / "runs" / "emoji" / stage
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all(any(line[f"loss/{kind}"] for line in lines) for kind in ("text", "image"))  # questions and captions are learned
    model = str(emoji / "runs" / "emoji" / "sft" / "model")
    assert main(["generate", "thing 4", "--model", model, "--out", str(emoji / "drawn")]) == 0
    assert read_image(emoji / "drawn" / "000_thing_4.png").size == (16, 16)
    out = emoji / "answers"
    suite = f"{FOLDER / 'questions.py'}:Questions"
    assert main(["eval", suite, "--model", model, "--data", "data/emoji/heldout_concepts", "--out", str(out), "--batch", "8"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["counts"]["outputs"] == 2 and set(results["categories"]) == {"what is drawn?", "画的是什么？"}


def test_the_walk_through_has_the_stages_in_their_order():
    said = re.findall(r"^xomni train --config=configs/emoji/(\w+)\.py$", (FOLDER / "README.md").read_text(), flags=re.M)
    assert tuple(said) == STAGES
