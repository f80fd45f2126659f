"""Plans of inference: the programs of a batch of images, and of answers whose length nobody knows beforehand."""

import dataclasses

import pytest

from xomni_jax.assets import TINY_SFT
from xomni_jax.core.config import ConfigError
from xomni_jax.planner import chips, plan
from xomni_jax.planner.check import checks
from xomni_jax.training.stage import load_config

CPU = chips.parse("cpu:4")


def tiny(tmp_path, *overrides):
    path = tmp_path / "tiny.py"
    path.write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(dict(stage='inference'))\n")
    small = ["batch=2", "decode_batch=1", "prompt_length=32", "height=32", "width=64", "mesh.tensor=2", f"model={TINY_SFT}"]
    return load_config(path, [*small, *overrides])


def test_every_program_of_a_batch(tmp_path):
    stage = plan.programs_on(tiny(tmp_path), CPU)
    assert {name: program.per_step for name, program in stage.programs.items()} == {
        "rollout": 1, "prefill": 1, "decoder": 2, "text": 0, "vae": 0, "answer": 0,
    }  # fmt: skip
    assert stage.programs["rollout"].about.startswith("32 codes of 4 prompts") and stage.programs["decoder"].about.startswith(
        "2 images of 32x64"
    )
    assert set(stage.persistent) == {"sampler", "siglip_vq", "mmdit", "t5", "clip", "autoencoder"}


def test_answers_end_when_they_end(tmp_path):
    (analysis,) = plan.make_plan(tiny(tmp_path), CPU, ["answer"], tmp_path, propose=False, quiet=True).analyses
    assert len(analysis.unknown) == 1
    assert [c.name for c in checks(analysis, CPU) if not c.ok] == []
    # A second such loop would be one too many.
    worse = dataclasses.replace(analysis, unknown=analysis.unknown * 2)
    assert [c.name for c in checks(worse, CPU) if not c.ok] == ["loops understood"]


def test_what_would_make_it_fit(tmp_path):
    """Where a program of inference does not fit, smaller batches are tried, and the one that was compiled is named."""
    config = tiny(tmp_path, "batch=8", "decode_batch=8")
    assert plan.fewer(config, "rollout", 2) == ["batch=4"] and plan.fewer(config, "decoder", 4) == ["decode_batch=2"]


@pytest.mark.parametrize(
    "override, told",
    [
        ("height=33", "config.height=33, config.width=64: 33x64 pixels are not whole 8x8 tokens"),
        ("mesh.tensor=3", "cpu:4 (4 devices): mesh"),
        ("model=/nowhere", "config.transformer.preset=stored, but /nowhere holds no transformer on this machine"),
    ],
)
def test_what_is_wrong_is_told(override, told, tmp_path):
    with pytest.raises(ConfigError) as e:
        plan.programs_on(tiny(tmp_path, override), CPU)
    assert told in str(e.value)
