"""Who may train in a directory, and which command continues the run that it holds."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.miniature import ROOT
from xomni_jax.checkpoint.store import CheckpointError
from xomni_jax.core.config import ConfigError
from xomni_jax.evaluation.run_directory import RunDirectory, RunError
from xomni_jax.training import run_directory
from xomni_jax.training.run_directory import check_continues, check_room, claimed, save_config
from xomni_jax.training.stage import load_config

SFT, GRPO = ROOT / "configs" / "tiny" / "sft.py", ROOT / "configs" / "tiny" / "grpo.py"


# ---- one writer ----
def test_a_second_training_in_one_directory_is_refused(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    with claimed(tmp_path / "run"):
        for spelled in (tmp_path / "run", tmp_path / "x" / ".." / "run", link):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* trains here; wait for it, or name another folder"):
                with claimed(spelled):
                    pass
        (tmp_path / "run" / "config.json").write_text("{}")
    with claimed(link):
        pass


def test_a_run_that_was_refused_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such model"):
        with claimed(tmp_path / "run"):
            raise ConfigError("no such model")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    program = f"""
import os, pathlib, signal
from xomni_jax.training.run_directory import claimed
with claimed(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    assert "process" in (tmp_path / "lock").read_text()
    with claimed(tmp_path):
        pass


def test_an_evaluation_does_not_write_into_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=f"--out {tmp_path} holds a training run; give another folder"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize(
    "file, told", [("model.json", "holds a model directory"), ("settings.json", "holds an evaluation"), (None, "is a file")]
)
def test_folders_of_other_commands_are_refused(file, told, tmp_path):
    path = tmp_path / "out"
    if file:
        path.mkdir()
        (path / file).write_text("{}")
    else:
        path.write_text("")
    with pytest.raises(ConfigError, match=f"config.run_dir={path} {told}; name another folder for the run"):
        with claimed(path):
            pass
    assert not file or [p.name for p in path.iterdir()] == [file]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run cannot be written .Not a directory.; mend that, or name another folder"):
        with claimed(tmp_path / "file" / "run"):
            pass
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); make room, the same command goes on"):
        with claimed(tmp_path / "run"):
            raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError):  # of another file, whose own error is the better one
        with claimed(tmp_path / "run"):
            open(tmp_path / "not there")


def test_a_disk_too_small_for_a_checkpoint(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free // 2)
    with pytest.raises(ConfigError, match="a checkpoint takes [0-9.]+ [KMG]B, the disk has [0-9.]+ [KMG]B left; make room"):
        check_room(tmp_path, 2 * free)


# ---- the same run ----
@pytest.fixture
def model(tmp_path):
    """A directory that passes for a model."""
    path = tmp_path / "models" / "first"
    path.mkdir(parents=True)
    (path / "model.json").write_text('{"format": 1, "components": {}}')
    return path


def started(tmp_path, *overrides, file=SFT, steps=("4",)):
    """The configuration of a run with these checkpoints."""
    config = load_config(file, [f"run_dir={tmp_path / 'run'}", "init_from=", *overrides])
    for step in steps:
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    save_config(config)
    return config


def resumed(tmp_path, *overrides, file=SFT):
    check_continues(load_config(file, [f"run_dir={tmp_path / 'run'}", "init_from=", *overrides]))


def test_what_may_change_between_sessions(tmp_path):
    started(tmp_path)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"] == ["all"]
    resumed(tmp_path, "steps=5", "save_every=6", "keep=7", "save_minutes=1", "grid_every=0")
    with pytest.raises(
        ConfigError, match="started with config.next_token.rows=[0-9]+, now it is 8; use another run_dir or delete this one"
    ):
        resumed(tmp_path, "next_token.rows=8")


def test_services_may_move(tmp_path):
    started(tmp_path, file=GRPO)
    resumed(tmp_path, "rewards.ocr.urls=('http://elsewhere:1',)", file=GRPO)


@pytest.mark.parametrize(
    "key, default, other",
    [
        ("accumulate", "1", "2"),
        ("guard.spike", "0.0", "5.0"),
        ("rewards.ocr.scale", "1.0", "2.0"),
        ("data.split", "train", "heldout"),
        ("decode.steps", "None", "3"),
    ],
)
def test_a_key_that_is_newer_than_the_run_has_its_default(key, default, other, tmp_path):
    """As after an upgrade: the stored configuration does not know the key."""
    started(tmp_path, file=GRPO)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    *sections, name = key.split(".")
    section = stored
    for part in sections:
        section = section[part]
    del section[name]
    path.write_text(json.dumps(stored))
    resumed(tmp_path, f"{key}={default}", file=GRPO)
    with pytest.raises(ConfigError, match=f"started with config.{key}=.*, now it is "):
        resumed(tmp_path, f"{key}={other}", file=GRPO)


def test_newer_keys_of_a_mixture_and_of_a_model(tmp_path):
    mixture = ["data.source=mixture", "data.parts.signs.source=rendered", "transformer.preset=tiny"]
    started(tmp_path, *mixture, file=GRPO)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["data"]["parts"]["signs"]["split"], stored["transformer"]["rms_eps"]
    path.write_text(json.dumps(stored))
    resumed(tmp_path, *mixture, file=GRPO)
    for other in ("data.parts.signs.split=heldout", "transformer.rms_eps=1e-5"):
        with pytest.raises(ConfigError, match=f"started with config.{other.partition('=')[0]}=.*, now it is "):
            resumed(tmp_path, *mixture, other, file=GRPO)


@pytest.mark.parametrize("steps", [(), ("6.damaged",), ("6.orbax-checkpoint-tmp",)])
def test_a_configuration_binds_with_the_first_checkpoint(steps, tmp_path):
    started(tmp_path, "next_token.rows=4", steps=steps)
    resumed(tmp_path, "next_token.rows=8", "seed=3")


def test_where_a_run_and_its_model_lie_does_not_matter(tmp_path, model, monkeypatch):
    started(tmp_path, f"init_from={model}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    moved = shutil.copytree(model, tmp_path / "moved")
    for spelled in ("models/first", "./models/first/", "models/../models/first", "link", moved):
        for run in ("run", "./run", "run/"):
            check_continues(load_config(SFT, [f"run_dir={run}", f"init_from={spelled}"]))
    shutil.copytree("run", "elsewhere")
    check_continues(load_config(SFT, ["run_dir=elsewhere", f"init_from={moved}"]))


def test_another_model_is_another_run(tmp_path, model):
    started(tmp_path, f"init_from={model}")
    other = shutil.copytree(model, tmp_path / "models" / "second")
    (other / "model.json").write_text('{"format": 1, "components": {"t5": {}}}')
    with pytest.raises(ConfigError, match=f"started with config.init_from='{model}', now it is another model, in '{other}'"):
        resumed(tmp_path, f"init_from={other}")
    with pytest.raises(CheckpointError, match="no such directory; give a model directory"):
        resumed(tmp_path, "init_from=/nowhere")


def test_a_class_of_ones_own_may_be_spelled_otherwise():
    same = run_directory.same
    assert same("mine/source.py:Signs", "/home/me/mine/source.py:Signs") and same("a/./b", "a/b") and same(3, 3)
    assert not same("mine/source.py:Signs", "mine/source.py:Words") and not same("adamw", "muon") and not same(None, "a")


def test_a_damaged_configuration_is_named(tmp_path):
    started(tmp_path)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is damaged; restore it, or name another run_dir"):
        resumed(tmp_path)
