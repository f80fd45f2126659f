"""The loss on other examples: what it is, that training does not notice it, and the model that had the smallest one."""

import json

import jax
import numpy as np
import pytest

import xomni_jax
from tests.miniature import stage_config
from tests.test_metrics import documented
from tests.training.test_stages import assert_same, metrics, params, stop_after
from xomni_jax.core.config import ConfigError
from xomni_jax.data.sources import batches
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.next_token import next_token_loss
from xomni_jax.training.pretrain import packed_batch
from xomni_jax.training.run import run_stage
from xomni_jax.training.validation import LOSS, VALIDATION_SEED

SHARED = ["steps=4", "data.first=4", "grid_every=0"]  # the same four examples in every step
VALIDATED = [*SHARED, "validation.every=3", "validation.batches=2", "validation.best=True"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_dir):
    """(name, overrides) -> run directory of a finished run of fine-tuning."""
    root = tmp_path_factory.mktemp("validation")

    def make(name, *overrides):
        if not (root / name / "model").is_dir():
            run_stage(stage_config("sft", root / name, f"init_from={model_dir}", *overrides))
        return root / name

    return make


def without(lines):
    return [{name: value for name, value in line.items() if not name.startswith("validation/")} for line in lines]


def test_it_is_the_loss_on_examples_of_another_seed(run, model_dir):
    run_dir = run("validated", *VALIDATED)
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if LOSS in line] == [3, 4], "every third step, and the last one"
    assert set(lines[-1]) <= documented("sft")

    cfg = stage_config("sft", "unused", *VALIDATED, "data.first=0")
    model, mesh_free = xomni_jax.load(run_dir / "model"), xomni_jax.load(model_dir)
    ar = model.config("transformer")
    sizes = dict(vocab_size=ar.vocab_size, image_vocab_size=ar.image_vocab_size, mm_vocab_size=ar.mm_vocab_size)
    text = MultimodalTokenizer.load(model.path / "tokenizer", **sizes)
    seen = []
    for examples in batches(cfg.data, cfg.seed + VALIDATION_SEED, cfg.batch_size, count=2, prefetch=0):
        batch = packed_batch(cfg, mesh_free, text, None, examples)[0].without_sources()
        seen.append(next_token_loss(ARTransformer(ar), model.params("transformer"), batch, batch, cfg.next_token)[1])
    expected = jax.tree.map(lambda *x: np.mean(x), *seen)
    for name, value in expected.items():
        np.testing.assert_allclose(lines[-1][f"validation/{name}"], value, rtol=1e-5)  # float32 sums of about a hundred targets


def test_training_is_the_same_with_it_and_without(run):
    with_it, alone = run("validated", *VALIDATED), run("alone", *SHARED)
    assert without(metrics(with_it)) == metrics(alone)
    assert_same(params(with_it, "transformer"), params(alone, "transformer"))
    assert not (alone / "best").exists()


def test_the_best_model_is_that_of_the_smallest_loss_also_when_resumed(run, model_dir, tmp_path, monkeypatch):
    """A learning rate that ruins the model: the first validation is the best one."""
    ruinous = [*VALIDATED, "optimizer.learning_rate=1.0", "optimizer.warmup_steps=0", "optimizer.schedule=constant", "validation.every=1"]
    run_dir = run("ruined", *ruinous)
    losses = {line["step"]: line[LOSS] for line in metrics(run_dir)}
    best = min(losses, key=losses.get)
    assert losses[best] < losses[4]
    note = json.loads((run_dir / "best" / "model.json").read_text())["components"]["transformer"]["note"]
    assert (note["step"], note[LOSS]) == (best, losses[best])
    again = stage_config("sft", tmp_path / "run", f"init_from={model_dir}", *ruinous)
    stop_after(3, monkeypatch)
    assert run_stage(again) is None
    monkeypatch.undo()
    assert run_stage(again)
    assert metrics(tmp_path / "run") == metrics(run_dir)
    best_of = lambda folder: jax.tree.leaves(xomni_jax.load(folder / "best").params("transformer"))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, best_of(tmp_path / "run"), best_of(run_dir))


def test_a_finite_set_needs_other_files(model_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"caption": "a sign", "image": "none.png"}\n')
    files = ["data.source=files", f"data.path={tmp_path / 'rows.jsonl'}", "data.sizes=((16, 32),)"]
    with pytest.raises(ConfigError, match=r"config\.validation\.data is empty.*config\.validation\.data\.path=FILES"):
        stage_config("sft", "unused", *files, "validation.every=1").validation.open(stage_config("sft", "unused", *files).data)
    with pytest.raises(ConfigError, match=r"config\.validation\.data\.pth: unknown key; did you mean path"):
        cfg = stage_config("sft", "unused", *files, "validation.every=1", "validation.data.pth=other.jsonl")
        cfg.validation.open(cfg.data)
    cfg = stage_config("sft", "unused", *files, "data.first=2", "validation.data.path=other.jsonl")
    held = cfg.validation.open(cfg.data)
    assert held.options.path == "other.jsonl" and held.options.sizes == cfg.data.options.sizes and not held.first


def test_what_cannot_be_read_is_told_under_its_own_key(model_dir, tmp_path):
    files = ["data.source=files", "data.path=missing.jsonl", "data.sizes=((16, 32),)"]
    run = f"init_from={model_dir}", "validation.every=1", *(f"validation.{file}" for file in files)
    with pytest.raises(ConfigError, match=r"config\.validation\.data\.path=missing\.jsonl: no such file or folder"):
        run_stage(stage_config("sft", tmp_path / "run", *run))
