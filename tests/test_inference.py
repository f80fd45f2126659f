"""Configurations of inference: where options come from, how components are computed, and what is refused."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cli.test_main import refusal
from tests.miniature import ROOT
from xomni_jax.cli.inference import add_drawing, add_model, settle
from xomni_jax.cli.main import main
from xomni_jax.inference import InferenceConfig, open_model, read_config
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.mesh import make_mesh

FILE = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict(dict(
        stage="inference", model={model!r}, temperature=0.0, height=16, width=24, mmdit=dict(int8=True),
        transformer=dict(dtype="bfloat16"), decode=dict(steps=1), mesh=dict(tensor=1),
    ))
    return c
"""


@pytest.fixture
def config_file(tmp_path, model_dir):
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(model=str(model_dir)))
    return path


def settled(*arguments):
    parser = argparse.ArgumentParser()
    add_model(parser, "", "one device")
    add_drawing(parser)
    args = parser.parse_args([str(a) for a in arguments])
    settle(args)
    return args


def test_flags_come_before_the_file_and_the_file_before_the_released_values(config_file, model_dir):
    args = settled("--config", config_file, "--temperature", "0.7", "--mesh", "fsdp=2")
    assert (args.temperature, args.height, args.width, args.top_k, args.min_p) == (0.7, 16, 24, 50, 0.03)
    assert args.model == str(model_dir) and args.mesh == {"fsdp": 2}
    assert settled("--config", config_file).mesh == {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1}
    plain = settled()
    assert {n: getattr(plain, n) for n in ("model", "top_k", "guidance", "mesh")} == {
        "model": InferenceConfig().model, "top_k": 50, "guidance": 1.0, "mesh": None,
    }  # fmt: skip


def test_overrides_change_the_file(config_file, capsys):
    assert main(["generate", "a", "--config", str(config_file), "--config.decode.steps=0"]) == 2
    assert "config.decode: decode.steps=0 must be at least 1" in capsys.readouterr().err
    assert "none is given; add --config=FILE" in refusal(capsys, "generate", "a", "--config.decode.steps=1")


def test_components_are_computed_as_the_file_says(config_file, model_dir):
    model = open_model(model_dir, config=read_config(config_file))
    assert model.config("transformer").dtype == jnp.bfloat16 and model.decode_config.steps == 1
    assert {x.dtype for x in jax.tree.leaves(model.params("mmdit"))} >= {jnp.dtype(jnp.int8)}
    assert open_model(model_dir).decode_config.steps == 2


def test_the_command_draws_what_the_file_says(config_file, tmp_path, capsys):
    assert main(["generate", "a", "--config", str(config_file), "--mesh", "fsdp=-1", "--out", str(tmp_path / "out")]) == 0
    assert "1 image of 16x24 in " in capsys.readouterr().out


def test_an_evaluation_notes_how_it_was_computed(config_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "eval",
        "rendered-text",
        "--config",
        str(config_file),
        "--mesh",
        "data=1,fsdp=-1",
        "--out",
        str(out),
        "--limit",
        "1",
        "--phase",
        "generate",
    ]
    assert main(arguments) == 0
    noted = json.loads((out / "settings.json").read_text())
    assert noted["computed"]["mmdit"]["int8"] is True and noted["computed"]["decode"]["steps"] == 1
    assert noted["sampling"]["temperature"] == 0.0 and noted["batch"] == 16


def test_the_sampler_reads_its_weights_at_home(model_dir):
    """Whole over fsdp: nothing is fetched for every token; and the codes are those of one device."""
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    model, alone = open_model(model_dir, mesh), open_model(model_dir)
    split = [str(x.sharding.spec) for x in jax.tree.leaves(model.params("transformer"))]
    assert any("tensor" in spec for spec in split) and not any("fsdp" in spec for spec in split)
    keys = jax.random.split(jax.random.key(3), (2, 1))
    drawn = [m.sample_codes(["ab", "c"], (2, 3), keys, SamplingConfig())["codes"] for m in (model, alone)]
    np.testing.assert_array_equal(*map(np.asarray, drawn))


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_the_released_sizes(name):
    config = read_config(ROOT / "configs" / "xomni" / f"{name}.py")
    assert config.model == "models/xomni" and config.mesh.tensor == 4 and config.transformer.preset == "xomni-7b"


def test_it_is_no_training(config_file, capsys):
    assert "config.stage='inference' trains nothing; give this file to" in refusal(capsys, "train", f"--config={config_file}")


@pytest.mark.parametrize(
    "change, told",
    [
        ("c.stage = 'sft'", "is of stage 'sft'; give one of stage 'inference', such as configs/xomni/generate.py"),
        ("c.batch = 0", "config.batch=0 must be at least 1"),
        ("c.colour = 1", "config.colour: unknown key; known here: autoencoder, batch, "),
        ("c.temprature = 1.0", "config.temprature: unknown key; did you mean temperature?"),
        ("c.mmdit.n_single = 7", "config.mmdit.n_single=7, but the mmdit of"),
        ("c.mesh.tensor = 4", "config.mesh.tensor=4: 2 key and value heads do not split 4 ways; use 1, 2"),
        ("c.decode.steps = 0", "config.decode: decode.steps=0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_told(change, told, config_file, tmp_path, capsys):
    config_file.write_text(config_file.read_text().replace("    return c", f"    {change}\n    return c"))
    assert told in refusal(capsys, "generate", "a", "--config", str(config_file), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
