"""Configurations: dataclasses hold the defaults, files and the command line name what differs, anything else is refused."""

import ast
import dataclasses

import pytest

from tests.miniature import ROOT
from xomni_jax.core.config import ConfigError, Overrides, as_dict, build, explanations, flat, load_changes, shown, updated
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import DataSection
from xomni_jax.inference import InferenceConfig
from xomni_jax.models.section import ModelSection
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.rewards import RewardConfig
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.training.optimizer import OptimizerConfig
from xomni_jax.training.stage import STAGES, RunConfig, load_config, resolve

NOT_TRAINING = ("__init__", "models", "paths", "generate", "evaluate", "questions")
FILES = [p for folder in ("tiny", "emoji", "xomni") for p in sorted((ROOT / "configs" / folder).glob("*.py")) if p.stem not in NOT_TRAINING]
GRPO = ROOT / "configs" / "tiny" / "grpo.py"


def ids(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_file_says_what_differs_and_nothing_else(path):
    """Every key of the file changes a default; the stage alone names its class."""
    changes = load_changes(path)
    default, chosen = (flat(as_dict(c)) for c in (STAGES.get(changes.values["stage"]).Config(), resolve(changes)))
    same = [key for key in changes.file if key != "stage" and key in default and default[key] == chosen[key]]
    # A recipe may repeat a number of the paper that is the default as well.
    assert set(same) <= {"decode.guidance", "mmdit.param_dtype"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_file_says_how_to_run_it(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert f"configs/{path.parent.name}/{path.name}" in said or "launch/" in said


def test_the_stages_of_the_shipped_files_follow_one_another():
    """Each starts from a model that another one writes, or that ships."""
    configs = [load_config(path) for path in FILES]
    written = {f"{c.run_dir}/model" for c in configs} | {"", "xomni_jax/assets/tiny_sft"}
    assert {c.init_from for c in configs} <= written
    assert len({c.run_dir for c in configs}) == len(configs)


def sections(config):
    """Every dataclass in use, with where it stands; the classes behind presets and sources among them."""
    yield type(config).__name__, type(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (ModelSection, Overrides)):
            yield f.name, value.cls
        elif isinstance(value, DataSection):
            yield f.name, type(value.options)
        elif isinstance(value, dict):
            yield f.name, type(next(iter(value.values())))
        elif dataclasses.is_dataclass(value):
            yield f.name, type(value)


@pytest.mark.parametrize("stage", STAGES.names())
def test_every_field_is_explained(stage):
    missing = {
        f"{where}.{f.name}"
        for where, cls in sections(STAGES.get(stage).Config())
        for f in dataclasses.fields(cls)
        if f.init and not explanations(cls).get(f.name)
    }
    assert not missing


@pytest.mark.parametrize("stage", STAGES.names())
def test_every_field_is_reached_by_its_own_value(stage):
    """`--config.KEY=VALUE` with the default of every key gives the defaults again, typed alike."""
    default = STAGES.get(stage).Config()
    for key, value in flat(as_dict(default)).items():
        *path, last = key.split(".")
        values = {last: value}
        for name in reversed(path):
            values = {name: values}
        assert flat(as_dict(updated(default, values)))[key] == value, key


@pytest.mark.parametrize(
    "override, value",
    [
        ("steps=7", 7),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.schedule=linear", "linear"),
        ("run_dir=7", "7"),
        ("data.sizes=[[32,128]]", ((32, 128),)),
        ("data.text_lengths=[[2,5]]", ((2, 5),)),
        ("grpo.delta=1.5", 1.5),
        ("grpo.kl_importance=true", True),
        ("rewards.ocr.weight=None", None),
        ("rewards.ocr.urls=('http://a','http://b')", ("http://a", "http://b")),
        ("rewards.mine.weight=2", 2.0),
        ("rollout.segment=5", 5),
        ("decode.steps=3", 3),
        ("transformer.remat=full", "full"),
        ("transformer.dtype=bfloat16", "bfloat16"),
    ],
)
def test_overrides(override, value):
    config = as_dict(load_config(GRPO, [override, "data.weights=[1.0]"]))
    for key in override.split("=")[0].split("."):
        config = config[key]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("stepz=7", "config.stepz: unknown key; did you mean steps"),
        ("optimizer.rate=7", "config.optimizer.rate: unknown key; did you mean rates"),
        ("optimiser.name=7", "config.optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.zzz=7", "config.optimizer.zzz: unknown key; known here: b1, "),
        ("steps.more=7", "config.steps={'more': '7'}: expected int, such as 1000"),
        ("steps=many", "config.steps=many: expected int, such as 1000"),
        ("steps=7.5", "config.steps=7.5: expected int"),
        ("steps", "override 'steps' has no value; write --config.steps=VALUE"),
        ("grpo.kl_importance=perhaps", "config.grpo.kl_importance=perhaps: expected bool, such as False"),
        ("grpo.clip_low=True", "config.grpo.clip_low=True: expected float"),
        ("optimizer=None", "config.optimizer is a section; set one of its keys: b1, b2"),
        ("rewards.ocr=None", "config.rewards.ocr is a section; set one of its keys: any_version, attempts"),
        ("decode.step=1", "config.decode.step: unknown key; did you mean steps?"),
        (
            "data.source=dreams",
            "config.data.source: the source 'dreams' is unknown; use one of rendered, rehearsal, edits, files, prompts, codes",
        ),
        ("data.size=((32,64),)", "config.data.size: unknown key; did you mean sizes"),
        ("transformer.preset=huge", "config.transformer.preset='huge' is unknown; use one of xomni-7b, tiny"),
        ("transformer.d_modle=1", "config.transformer.d_modle: unknown key; did you mean d_model"),
        ("stage=dreams", "config.stage: the stage 'dreams' is unknown; use one of tokenizer, "),
        ("stage=launch/local.py:main", "config.stage=launch/local.py:main: is no stage: it has no Config or no programs"),
        ("data.source=launch/local.py:main", "config.data.source=launch/local.py:main: is no source: it has no Options with `sizes`"),
    ],
)
def test_wrong_overrides_name_the_key(override, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        load_config(GRPO, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config(:", "invalid syntax"),
        ("x = 1", "defines no get_config"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("def get_config():\n    return 1 / 0", "division by zero"),
        ("def get_config():\n    return {'steps': 1}", "get_config returns dict, not a ConfigDict"),
    ],
)
def test_files_that_cannot_be_read(text, words, tmp_path):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path / "config.py")
    assert str(tmp_path / "config.py") in str(error.value) and "\n" not in str(error.value)


def test_files_without_a_stage_or_with_a_wrong_value(tmp_path):
    file = tmp_path / "config.py"
    wrong = {"steps=1": "config.stage is missing; name one of tokenizer, ", "stage='sft', steps='many'": "config.steps='many'"}
    for values, words in wrong.items():
        file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict(dict({values}))\n")
        with pytest.raises(ConfigError, match=words):
            load_config(file)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="nowhere.py: no such config file; the shipped ones are under configs/"):
        load_config("nowhere.py")


@pytest.mark.parametrize(
    "cls, section, words",
    [
        (OptimizerConfig, {"learning_rate": "fast"}, "x.learning_rate='fast': expected float"),
        (OptimizerConfig, {"learning_rate": None}, "x.learning_rate=None: expected float"),
        (OptimizerConfig, {"learning_rate": 1e-3, "b3": 1}, "x.b3: unknown key; known here: b1, b2, "),
        (OptimizerConfig, {"learning_rate": -1.0}, "x.learning_rate=-1.0: expected float > 0.0"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": None}, "x.steps=None: expected int"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": True}, "x.steps=True: expected int"),
        (RunConfig, {"stage": "sft", "run_dir": "r", "steps": 0}, "x.steps=0: expected int >= 1"),
        (RunConfig, {"stage": "sft", "run_dir": ""}, "config.run_dir is empty"),
        (RewardConfig, {"urls": "http://a"}, "x.urls='http://a': expected tuple"),
        (RewardConfig, {"urls": ("http://a", 8)}, "expected tuple"),
        (GRPOConfig, {"delta": "none"}, "x.delta='none': expected float | None"),
        (RenderedConfig, {"sizes": ((32,),)}, "x.sizes="),
        (RenderedConfig, {"split": "both"}, "split='both'"),
    ],
)
def test_sections_are_checked(cls, section, words):
    with pytest.raises(ConfigError) as error:
        build(cls, section, "x")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_lists_become_tuples_and_whole_numbers_fit_floats():
    assert build(RewardConfig, {"urls": ["http://a"], "weight": 2}, "x") == RewardConfig(("http://a",), weight=2)


def test_changes_to_settings_that_are_known_later():
    asked = Overrides(DecodeConfig).updated({"steps": 3, "guidance": 2}, "decode").updated({"guidance": None}, "decode")
    assert asked.over(DecodeConfig(steps=28, text_length=9), "decode") == DecodeConfig(steps=3, text_length=9)
    assert as_dict(asked) == dict.fromkeys(f.name for f in dataclasses.fields(DecodeConfig)) | {"steps": 3}


def test_what_is_shown_says_where_values_come_from():
    changes = load_changes(GRPO, ["steps=9", "rewards.ocr.weight=0.5", "transformer.remat=full"])
    lines = shown(resolve(changes), changes).splitlines()

    def line(start):
        return next(x for x in lines if x[2:].strip().startswith(start))

    assert line("steps =").startswith("+ steps = 9  # optimizer updates")
    assert line("batch_size =").startswith("* batch_size = 8")
    assert line("kl_estimator =").startswith("    kl_estimator = 'k3'  # ")
    assert line("weight = 0.5").startswith("+ ") and line("remat =").startswith("+ ") and line("noise =").startswith("  ")
    assert any(x.strip().startswith("optimizer:") for x in lines)
    every = flat(as_dict(resolve(changes)))
    assert len(lines) >= len(every)


def test_inference_has_the_same_reader(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict(dict(stage='inference', top_k=7))\n")
    assert load_config(file, ["mesh.tensor=2"]) == dataclasses.replace(
        InferenceConfig(), top_k=7, mesh=dataclasses.replace(InferenceConfig().mesh, tensor=2)
    )
