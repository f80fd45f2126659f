"""Every stage runs from its own shipped configuration, cut down, on a mesh of eight devices; each starts from the one before."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.linen import meta

import xomni_jax
from tests.miniature import ROOT, SIZE, configs, stage_config
from tests.test_metrics import documented
from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.models.registry import init_params
from xomni_jax.sharding.abstract import leaves, path_name
from xomni_jax.training.metrics import MetricWriter
from xomni_jax.training.run import run_stage

# file of configs/tiny -> (file whose model it starts from, overrides).
CHAIN = {
    "tokenizer": ("", ["steps=4"]),
    "decoder": ("tokenizer", ["mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1", "batch_size=8"]),
    "pretrain_2": ("decoder", []),
    "sft": ("pretrain_2", ["steps=4"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """file -> run directory of its finished run, made when first asked for."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(file: str) -> Path:
        if file not in done:
            assert run_stage(chained(file, root / file, run)) == root / file / "model"
            done[file] = root / file
        return done[file]

    return run


def chained(file, run_dir, finished, *more):
    before, overrides = CHAIN[file]
    return stage_config(file, run_dir, f"init_from={finished(before) / 'model' if before else ''}", *overrides, *more)


def metrics(run_dir: Path) -> list[dict]:
    """Logged metrics, without what the clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def params(run_dir: Path, name: str) -> dict[str, np.ndarray]:
    """{path: array} of a component of the run's model."""
    tree = xomni_jax.load(run_dir / "model").params(name)
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


TRAINED = {
    "tokenizer": ("siglip_vq",),
    "decoder": ("autoencoder", "clip", "mmdit", "siglip_vq", "t5"),
    "pretrain_2": ("autoencoder", "clip", "mmdit", "siglip_vq", "t5", "transformer"),
    "sft": ("autoencoder", "clip", "mmdit", "siglip_vq", "t5", "transformer"),
}


@pytest.mark.parametrize("file", TRAINED)
def test_a_stage_leaves_everything_in_its_run_directory(file, finished):
    run_dir = finished(file)
    config = json.loads((run_dir / "config.json").read_text())
    steps = config["steps"]
    assert config["run_dir"] == str(run_dir) and config["optimizer"]["b2"] == 0.95
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        assert all(value is not None and np.isfinite(value) for value in line.values())
        assert {"optim/grad_norm", "optim/update_norm", "optim/param_norm", "optim/lr"} <= set(line)
        assert any(name.startswith("loss/") for name in line)
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert "perf/step_s" in written[-1] and {name for line in written for name in line} <= documented(config["stage"])
    assert list((run_dir / "tensorboard").glob("events*"))
    images = sorted(p.name for p in (run_dir / "images").glob("*.png")) if file != "tokenizer" else []
    assert images == ([] if file == "tokenizer" else ["step_000000.png", "step_000002.png", f"step_{steps:06d}.png"])
    checkpoints = RunCheckpoints(run_dir / "checkpoints")
    assert checkpoints.manager.all_steps() == [2, steps]
    checkpoints.close()
    described = json.loads((run_dir / "model" / "model.json").read_text())
    assert tuple(sorted(described["components"])) == TRAINED[file]
    assert described["settings"]["preprocess"]["patch_size"] == 8
    assert not list(run_dir.glob("*.part"))


def test_the_chain_ends_in_a_model_that_draws_and_answers(finished):
    model = xomni_jax.load(finished("sft") / "model")
    image = model.generate('a red sign that says "AB"')[0]
    assert image.size == (SIZE[1], SIZE[0])
    assert isinstance(model.chat(image, "what does the sign say?", 4), str)


def test_the_first_pretraining_moves_what_is_new_and_nothing_else():
    optimizer = stage_config("pretrain_1", "unused").make_optimizer()
    params = meta.unbox(jax.eval_shape(lambda: init_params("transformer", configs()["transformer"], jax.random.key(0))))
    new = ("adapters/", "heads/", "mm_embed/", "mm_norm/", "mm_head/")
    assert set(optimizer.trained(params)) == {name for name, _ in leaves(params) if name.startswith(new)}


def test_components_that_are_not_trained_are_carried_along(finished):
    for name in ("siglip_vq", "mmdit", "t5", "clip"):
        assert_same(params(finished("decoder"), name), params(finished("sft"), name))


def stop_after(step: int, monkeypatch) -> None:
    """Ctrl-C while the metrics of a step are written."""
    write = MetricWriter.write

    def interrupted(self, number, scalars):
        write(self, number, scalars)
        if number == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricWriter, "write", interrupted)


# The tokenizer stops just before its codebook starts, where its schedule has the most to lose.
@pytest.mark.parametrize("file, step, component", [("tokenizer", 1, "siglip_vq"), ("sft", 3, "transformer")])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(file, step, component, finished, tmp_path, monkeypatch, capsys):
    config = chained(file, tmp_path / "run", finished)
    stop_after(step, monkeypatch)
    assert run_stage(config) is None
    monkeypatch.undo()
    assert f"stopped after step {step} of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    assert run_stage(config) == tmp_path / "run" / "model"
    assert f"resuming {tmp_path / 'run'} after step {step}" in capsys.readouterr().out
    assert metrics(tmp_path / "run") == metrics(finished(file))
    assert_same(params(tmp_path / "run", component), params(finished(file), component))


KILLED = """
import os, signal, time
from pathlib import Path
from tests.miniature import stage_changes
from xomni_jax.training.metrics import MetricWriter

run_dir = Path({run_dir!r})
write = MetricWriter.write

def killed(self, step, scalars):
    write(self, step, scalars)
    while step == 3 and not (run_dir / "checkpoints" / "2").is_dir():
        time.sleep(0.01)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

MetricWriter.write = killed

def get_config():
    return stage_changes("sft", run_dir, "init_from={init_from}", "steps=4")
"""


def test_a_killed_process_goes_on_from_its_checkpoint(finished, tmp_path, capsys):
    run_dir = tmp_path / "run"
    (tmp_path / "config.py").write_text(KILLED.format(run_dir=str(run_dir), init_from=finished("pretrain_2") / "model"))
    command = [sys.executable, "-m", "xomni_jax.cli.main", "train", f"--config={tmp_path / 'config.py'}"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    first = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3] and not (run_dir / "model").exists()
    config = stage_config("sft", run_dir, f"init_from={finished('pretrain_2') / 'model'}", "steps=4")
    assert run_stage(config) == run_dir / "model"
    assert f"resuming {run_dir} after step 2" in capsys.readouterr().out
    assert metrics(run_dir) == metrics(finished("sft"))
    assert_same(params(run_dir, "transformer"), params(finished("sft"), "transformer"))


def test_another_configuration_may_not_go_on_in_a_run(finished):
    run_dir = finished("sft")
    before = (run_dir / "config.json").read_text()
    config = chained("sft", run_dir, finished, "optimizer.learning_rate=0.5")
    with pytest.raises(ConfigError, match=r"config.optimizer.learning_rate=0.01, now it is 0.5; use another run_dir"):
        run_stage(config)
    assert (run_dir / "config.json").read_text() == before


def test_fewer_steps_than_were_made_are_refused(finished):
    config = chained("sft", finished("sft"), finished, "steps=3")
    with pytest.raises(ConfigError, match="config.steps=3: .* has already made 4 steps"):
        run_stage(config)


@pytest.mark.parametrize(
    "file, overrides, words",
    [
        ("sft", ["init_from="], "config.init_from is empty; stage sft needs a model directory with siglip_vq"),
        ("sft", ["init_from=/nowhere"], "/nowhere: no such directory"),
        ("sft", ["next_token.rows=6"], "config.next_token.rows=6 does not split over the 4 ways"),
        ("sft", ["train=('later',)"], "config.train: 'later' matches no parameter; the nearest paths are "),
        ("sft", ["freeze=('languag/.*','mm_.*')"], "config.freeze: 'languag/..' matches no parameter; the nearest paths are .*language/"),
        ("sft", ["accumulate=3"], "config.accumulate=3 does not divide config.next_token.rows=4; use a divisor"),
        ("sft", ["accumulate=2"], "config.next_token.rows / config.accumulate=2 does not split over the 4 ways"),
        ("sft", ["lora.rank=2", "lora.targets=('.*/q_porj',)"], "config.lora.targets: '.*/q_porj' matches no dense layer; .*q_proj"),
        ("sft", ["transformer.int8=True"], "config.transformer.int8=True: kernels in 8 bits cannot learn"),
        ("decoder", ["freeze=('unet/.*',)"], "config.freeze: 'unet/..' matches no parameter"),
        ("sft", ["transformer.d_model=64"], "config.transformer.d_model=64, but the transformer of .* has 32"),
        ("sft", ["transformer.heads=64"], "config.transformer.heads: unknown key"),
        ("sft", ["mesh.fsdp=3"], "mesh fsdp=3 x tensor=2 needs 6 devices, 8 are present; change config.mesh"),
        ("sft", ["stage=decoder"], "config.next_token: unknown key; known here: "),
        ("sft", ["stage=dreams"], "config.stage: the stage 'dreams' is unknown; use one of tokenizer"),
        ("decoder", ["batch_size=5"], "config.batch_size=5 does not split over the 4 ways"),
        ("decoder", ["decoder.sigma=normal"], "sigma='normal' is unknown"),
        ("decoder", ["mmdit.int8=True"], "config.mmdit.int8=True: kernels in 8 bits cannot learn"),
        ("decoder", ["mmdit.axes_dims=(2,2,2)"], "config.mmdit: mmdit.axes_dims"),
        ("tokenizer", ["batch_size=6"], "config.batch_size=6 does not split"),
        ("tokenizer", ["siglip_vq.dtype=float31"], "config.siglip_vq.dtype='float31' is no number format"),
        ("tokenizer", ["siglip_vq.preset=huge"], "config.siglip_vq.preset='huge' is unknown"),
        ("tokenizer", ["preprocess.short_size=4"], "config.preprocess: ImageLimits: patch_size=8"),
        ("tokenizer", ["init_from=somewhere"], "the tokenizer is the first stage"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(file, overrides, words, model_dir, tmp_path):
    start = [] if file == "tokenizer" else [f"init_from={model_dir}"]
    with pytest.raises(ValueError, match=words) as error:
        run_stage(stage_config(file, tmp_path / "run", *start, *overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_stage_that_needs_more_than_the_model_has(model_dir, tmp_path, finished):
    config = stage_config("grpo", tmp_path / "run", f"init_from={finished('tokenizer') / 'model'}")
    with pytest.raises(ConfigError, match="this model has no transformer; stage grpo needs transformer, siglip_vq"):
        run_stage(config)
    assert not (tmp_path / "run").exists()


def test_the_miniature_is_made_of_the_shipped_components(model_dir):
    from xomni_jax.models.registry import COMPONENTS

    assert set(configs()) == set(COMPONENTS)
