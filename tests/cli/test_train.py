"""xomni train: overrides reach the stage, and what is wrong is told before anything is written."""

import json
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.miniature import ROOT
from xomni_jax.cli.main import main
from xomni_jax.training import run as training_run

SFT = f"--config={ROOT / 'configs' / 'tiny' / 'sft.py'}"
GRPO = f"--config={ROOT / 'configs' / 'tiny' / 'grpo.py'}"

MINIATURE = """
from tests.miniature import stage_changes

def get_config():
    return stage_changes({file!r}, {run_dir!r}, "init_from={init_from}")
"""


@pytest.fixture
def mini(tmp_path, model_dir, monkeypatch):
    """A function file -> --config argument of a cut-down configuration that starts from the random model."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])

    def write(file):
        path = tmp_path / f"{file}.py"
        path.write_text(MINIATURE.format(file=file, run_dir=str(tmp_path / "run"), init_from=model_dir))
        return f"--config={path}"

    return write


def test_overrides_reach_the_stage(monkeypatch):
    seen = []
    monkeypatch.setattr(training_run, "run_stage", seen.append)
    assert main(["train", SFT, "--config.steps=3", "--config.optimizer.learning_rate=0.5", "--config.run_dir=elsewhere"]) == 0
    assert (seen[0].steps, seen[0].optimizer.learning_rate, seen[0].run_dir, seen[0].stage) == (3, 0.5, "elsewhere", "sft")


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setattr(training_run, "run_stage", lambda config: jax.jit(lambda x: jax.numpy.sin(x) * 7.25)(1.0))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # which keeps the folder it was first used with
        main(["train", SFT, "--compilation-cache", str(tmp_path)])
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()
    assert any("lambda" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("model, code", [(None, 75), (ROOT, 0)])
def test_launchers_tell_a_stopped_run_from_a_finished_one(monkeypatch, model, code):
    monkeypatch.setenv("XOMNI_STOPPED_CODE", "75")
    monkeypatch.setattr(training_run, "run_stage", lambda config: model)
    assert main(["train", SFT]) == code


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--config=/nowhere.py"], "/nowhere.py: no such config file; the shipped ones are under configs/"),
        ([SFT, "--config.stepz=3"], "config.stepz: unknown key; did you mean steps"),
        ([SFT, "--config.steps=three"], "config.steps=three: expected int, such as"),
        ([SFT, "--config.steps=0"], "config.steps=0: expected int >= 1"),
        ([SFT, "--config.steps"], "override 'steps' has no value; write --config.steps=VALUE"),
        ([SFT, "--devices", "0"], "--devices 0 must be at least 1"),
        ([SFT, "--profile-steps", "8-3"], "--profile-steps 8-3: give two step numbers, such as 3-8"),
        ([SFT, "--profile-steps", "3-8", "--config.steps=5"], "--profile-steps 3-8: the run has 5 steps; name two of them"),
        ([SFT, "--config.init_from=/nowhere", "--config.next_token.rows=16"], "/nowhere: no such directory; give a model directory"),
        ([SFT, "--config.init_from=/nowhere"], "config.next_token.rows=14 does not split over the 8 ways of config.mesh"),
        ([SFT, "--config.mesh.tensor=3"], "mesh tensor=3 needs a multiple of 3 devices, 8 are present; change config.mesh"),
    ],
)
def test_what_is_wrong_is_told(arguments, told, capsys, tmp_path):
    rest = [a for a in arguments if "=/nowhere.py" not in a]
    run_dir = [f"--config.run_dir={tmp_path / 'run'}"] if rest == arguments else []
    assert told in refusal(capsys, "train", *arguments, *run_dir)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, overrides, told",
    [
        ("sft", ["next_token.rows=6"], "config.next_token.rows=6 does not split over the 4 ways of config.mesh"),
        (
            "grpo",
            ["rewards.ocr.urls=('http://127.0.0.1:9',)"],
            "no reward service answers at http://127.0.0.1:9 (ConnectError); start it with: xomni serve-reward ocr --port 9",
        ),
        ("grpo", ["data.sizes=((16,64),)"], "16x64: the long side may have at most 48 pixels with this model"),
        ("grpo", ["batch_size=6"], "leaves 6 prompts a chunk, which config.mesh cannot split 4 ways"),
    ],
)
def test_what_only_the_stage_can_see(file, overrides, told, mini, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert told in refusal(capsys, "train", mini(file), *(f"--config.{o}" for o in overrides))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_of_ones_own(mini, tmp_path, capsys):
    """Fine-tuning on images with captions beside them; what is wrong with them is told before anything is written."""
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    options = [mini("sft"), "--config.data.source=files", f"--config.data.path={images}", "--config.data.sizes=((16,32),)"]
    options += ["--config.steps=3", "--config.log_every=1", "--config.grid_every=0"]
    assert "images: holds no images; name files that hold some" in refusal(capsys, "train", *options)
    for n in range(5):
        Image.new("RGB", (70, 40), (50 * n, 90, 90)).save(images / f"{n}.png")
        (images / f"{n}.txt").write_text(f"the <|im_end|> number {n}")
    (images / "cut.png").write_bytes((images / "1.png").read_bytes()[:20])
    assert "1 of 6 records cannot be used; the first: " in refusal(capsys, "train", *options)
    (images / "cut.png").unlink()
    assert "examples have no question, answer, which this stage learns from, but only caption, id, image" in refusal(
        capsys, "train", *options
    )
    options += ["--config.next_token.generation=0.9", "--config.next_token.understanding=0", "--config.next_token.text=0.1"]
    assert not run.exists()
    assert main(["train", *options]) == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss/image"] > 0


def test_a_damaged_model_to_start_from(mini, model_dir, tmp_path, capsys):
    import shutil

    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "transformer" / "_METADATA").unlink()
    told = refusal(capsys, "train", mini("sft"), f"--config.init_from={tmp_path / 'model'}")
    assert f"{tmp_path / 'model' / 'transformer'}: cannot be read, it is incomplete or damaged" in told
    assert not (tmp_path / "run").exists()
