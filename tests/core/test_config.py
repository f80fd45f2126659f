"""Configurations are read whole: every key of the shipped ones has a reader, everything else is refused in one sentence."""

import ast
import dataclasses
import importlib
import json

import pytest
from ml_collections import ConfigDict

from tests.miniature import PRESETS, ROOT
from xomni_jax.core.config import ConfigError, RunConfig, apply_override, build, check_sections, load_config, run_config, save_resolved
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rewards import RewardConfig
from xomni_jax.rl.rollouts import RolloutConfig
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.rules import MESH_AXES
from xomni_jax.training.components import STORED, from_preset
from xomni_jax.training.decoder import DecoderTrainConfig
from xomni_jax.training.next_token import NextTokenConfig
from xomni_jax.training.optimizer import OptimizerConfig
from xomni_jax.training.run import STAGES
from xomni_jax.training.tokenizer import TokenizerConfig

NOT_TRAINING = ("__init__", "models", "generate", "evaluate")
FILES = [p for folder in ("tiny", "xomni") for p in sorted((ROOT / "configs" / folder).glob("*.py")) if p.stem not in NOT_TRAINING]
READERS = {
    "optimizer": OptimizerConfig,
    "tokenizer": TokenizerConfig,
    "data": RenderedConfig,
    "decoder": DecoderTrainConfig,
    "decode": DecodeConfig,
    "grpo": GRPOConfig,
    "advantage": AdvantageConfig,
    "sampling": SamplingConfig,
    "rollout": RolloutConfig,
}
# Not set by the shipped files: their defaults are always right for the embedded data.
UNSET = {"data": {"shape_sizes"}}


def fields(cls):
    return {f.name for f in dataclasses.fields(cls) if f.init}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_key_has_a_reader(path):
    config = load_config(path)
    run = run_config(config)
    check_sections(config, ("mesh", *importlib.import_module(STAGES[run.stage]).SECTIONS), run.stage)
    top = {key for key, value in config.items() if not isinstance(value, ConfigDict)}
    assert top == fields(RunConfig)  # nothing unread, and no key whose default is hidden from a reader of the files
    for name, section in config.items():
        if not isinstance(section, ConfigDict):
            continue
        if name in ("mesh", "decoder_mesh"):
            assert set(section) == set(MESH_AXES)
        elif name == "rewards":
            for reward in section.values():
                assert set(reward) == fields(RewardConfig)
                build(RewardConfig, reward, "rewards")
        elif name == "preprocess":
            assert set(section) == fields(ImageLimits) - {"patch_size"}  # the tokenizer's
        elif name == "next_token":
            assert set(section) == fields(NextTokenConfig) | {"phase"}
            build(NextTokenConfig, {k: v for k, v in section.items() if k != "phase"}, name)
        elif section.get("preset") == STORED:
            assert run.init_from and set(section) == {"preset"}
        elif "preset" in section:
            from_preset(section, PRESETS[name], name)
        elif name == "decode" and run.stage == "grpo":
            assert set(section) <= fields(DecodeConfig)  # None: the model's own
        else:
            assert set(section) == fields(READERS[name]) - UNSET.get(name, set()), name
            build(READERS[name], section, name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_says_how_to_run_it(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert f"configs/{path.parent.name}/{path.name}" in said or "launch/" in said


def test_the_stages_of_the_shipped_files_follow_one_another():
    """Each starts from a model that another one writes, or that ships."""
    configs = [load_config(path) for path in FILES]
    written = {f"{c.run_dir}/model" for c in configs} | {"", "xomni_jax/assets/tiny_sft"}
    assert {c.init_from for c in configs} <= written
    assert len({c.run_dir for c in configs}) == len(configs)


@pytest.mark.parametrize(
    "override, value",
    [
        ("steps=7", 7),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.schedule=linear", "linear"),
        ("run_dir=7", "7"),
        ("data.sizes=[[16,32]]", ([16, 32],)),
        ("grpo.delta=1.5", 1.5),
        ("grpo.kl_importance=true", True),
        ("rewards.ocr.weight=None", None),
        ("rewards.ocr.urls=('http://a','http://b')", ("http://a", "http://b")),
    ],
)
def test_overrides(override, value):
    config = load_config(ROOT / "configs" / "tiny" / "grpo.py", [override])
    for key in override.split("=")[0].split("."):
        config = config[key]
    assert config == value and type(config) is type(value)


def test_a_field_of_a_preset_may_be_overridden():
    config = load_config(ROOT / "configs" / "tiny" / "sft.py", ["transformer.d_model=64"])
    assert from_preset(config.transformer, PRESETS["transformer"], "config.transformer").d_model == 64


@pytest.mark.parametrize(
    "override, words",
    [
        ("stepz=7", "config.stepz: unknown key; known here: advantage, autoencoder, batch_size, "),
        ("optimizer.rate=7", "config.optimizer.rate: unknown key; known here: b1, "),
        ("optimiser.rate=7", "config.optimiser.rate: no section 'optimiser'; known here: "),
        ("steps.more=7", "config.steps.more: unknown key; known here: nothing"),
        ("steps=many", "config.steps=many: expected int, such as [0-9]+"),
        ("steps=7.5", "config.steps=7.5: expected int"),
        ("steps", "override 'steps' has no value; write --config.steps=VALUE"),
        ("grpo.kl_importance=perhaps", "config.grpo.kl_importance=perhaps: expected bool, such as False"),
        ("grpo.clip_low=True", "config.grpo.clip_low=True: expected float"),
        ("optimizer=None", "config.optimizer is a section; set one of its keys: b1, b2"),
    ],
)
def test_wrong_overrides_name_the_key(override, words):
    with pytest.raises(ConfigError, match=words) as error:
        load_config(ROOT / "configs" / "tiny" / "grpo.py", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config(:", "invalid syntax"),
        ("x = 1", "defines no get_config"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("from configs import base\ndef get_config():\n    return base.dreams()", "has no attribute 'dreams'"),
        (
            "from configs import base\ndef get_config():\n    c = base.sft()\n    c.steps = 'many'\n    return c",
            "Could not override field 'steps'",
        ),
        ("def get_config():\n    return 1 / 0", "division by zero"),
        ("def get_config():\n    return {'steps': 1}", "get_config returns dict, not a ConfigDict"),
    ],
)
def test_files_that_cannot_be_read(text, words, tmp_path):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path / "config.py")
    assert str(tmp_path / "config.py") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="nowhere.py: no such config file; the shipped ones are under configs/"):
        load_config("nowhere.py")


@pytest.mark.parametrize(
    "cls, section, words",
    [
        (OptimizerConfig, {}, "learning_rate"),
        (OptimizerConfig, {"learning_rate": "fast"}, "x.learning_rate='fast': expected float"),
        (OptimizerConfig, {"learning_rate": None}, "x.learning_rate=None: expected float"),
        (OptimizerConfig, {"learning_rate": 1e-3, "b3": 1}, "x.b3: unknown key; OptimizerConfig has b1, b2"),
        (OptimizerConfig, {"learning_rate": -1.0}, "x: learning_rate=-1.0 must be positive"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": None}, "x.steps=None: expected int"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": True}, "x.steps=True: expected int"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": 0}, "config.steps=0 must be at least 1"),
        (RunConfig, {"stage": "sft", "run_dir": ""}, "config.run_dir is empty"),
        (RewardConfig, {"urls": "http://a"}, "x.urls='http://a': expected tuple"),
        (RewardConfig, {"urls": ("http://a", 8)}, "expected tuple"),
        (GRPOConfig, {"delta": "none"}, r"x.delta='none': expected float \| None"),
        (RenderedConfig, {"sizes": ((32,),)}, "x.sizes="),
        (RenderedConfig, {"split": "both"}, "split='both'"),
    ],
)
def test_sections_are_checked(cls, section, words):
    with pytest.raises(ConfigError, match=words) as error:
        build(cls, section, "x")
    assert "\n" not in str(error.value)


def test_lists_become_tuples_and_whole_numbers_fit_floats():
    assert build(RewardConfig, {"urls": ["http://a"], "weight": 2}, "x") == RewardConfig(("http://a",), 2)


def test_what_may_change_between_sessions(tmp_path):
    config = load_config(ROOT / "configs" / "tiny" / "sft.py")
    save_resolved(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["next_token"]["phase"] == "all"
    later = config.copy_and_resolve_references().unlock()
    later.steps, later.save_every, later.keep = 5, 6, 7
    save_resolved(later, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 5
    grpo = load_config(ROOT / "configs" / "tiny" / "grpo.py")
    save_resolved(grpo, tmp_path / "grpo")
    grpo.unlock()
    apply_override(grpo, "rewards.ocr.urls=('http://elsewhere:1',)")
    save_resolved(grpo, tmp_path / "grpo")
    apply_override(later, "next_token.rows=8")
    with pytest.raises(
        ConfigError, match="started with config.next_token.rows=[0-9]+, now it is 8; use another run_dir or delete this one"
    ):
        save_resolved(later, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]
