"""What a checkpoint is said to hold, and how two are said to differ."""

import math
import shutil

import jax
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from xomni_jax.checkpoint.inspection import compare, describe, open_view
from xomni_jax.checkpoint.store import save_component
from xomni_jax.checkpoint.tensors import open_sharded


def test_a_model_directory_is_described(converted):
    lines = list(describe(open_view(converted[0])))
    assert lines[0] == f"{converted[0]}: model directory" and lines[-1] == "missing: nothing"
    assert f"transformer: {dirs.total(dirs.ar(dirs.SMALL['ar'])):,} parameters in 42 arrays, 0.000 GB, bfloat16" in lines
    assert f"autoencoder: {dirs.total(dirs.vae(dirs.SMALL['vae'])):,} parameters in 196 arrays, 0.000 GB, bfloat16" in lines
    assert any(line.startswith("  ") and "rope_theta=1000000.0" in line for line in lines)
    assert "settings.decode: base_shift=0.25, guidance=1.5, max_shift=1.25, pooled_length=11, steps=7" in lines


def test_released_directories_are_described(released):
    lines = list(describe(open_view(released[0])))
    assert lines[0] == f"{released[0]}: released X-Omni" and lines[-1] == "missing: autoencoder, t5, clip"
    assert "siglip_vq: 433,084 parameters in 36 arrays, 0.002 GB, float32" in lines
    lines = list(describe(open_view(released[1])))
    assert lines[0] == f"{released[1]}: FLUX.1-dev" and lines[-1] == "missing: transformer, siglip_vq, tokenizer"


def test_the_shipped_model_is_described():
    lines = list(describe(open_view("xomni_jax/assets/tiny_sft")))
    assert (
        any(line.startswith("autoencoder: 0 parameters in 0 arrays, 0.000 GB, no parameters") for line in lines)
        and lines[-1] == "missing: nothing"
    )


def test_a_damaged_part_is_said(released, converted, tmp_path):
    broken = shutil.copytree(converted[0], tmp_path / "model")
    (broken / "clip" / "_METADATA").unlink()
    assert any(line.startswith(f"unreadable: clip: {broken}/clip: cannot be read") for line in describe(open_view(broken)))
    spoilt = shutil.copytree(released[0], tmp_path / "x")
    (spoilt / "vit" / "projector.pth").unlink()
    lines = list(describe(open_view(spoilt)))
    assert any(line.startswith("unreadable: siglip_vq:") and "projector.pth" in line for line in lines)
    with pytest.raises(ValueError, match="holds no config.json"):
        open_view(tmp_path)


def test_equal_checkpoints(released, converted):
    assert [(d.name, d.note) for d in compare(open_view(converted[0]), open_view(converted[0]))] == []
    assert [d.name for d in compare(open_view(released[0]), open_view(converted[0]))] == ["autoencoder", "t5", "clip"]


def test_differences_are_measured(converted, tmp_path):
    other = shutil.copytree(converted[0], tmp_path / "model")
    model = xomni_jax.load(other)
    params = model.params("transformer")
    kernel = params["language"]["mlp"]["up_proj"]["kernel"]
    params["language"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 3, 2].add(0.5).at[2, 0, 0].add(-0.25)
    params["lm_norm"]["scale"] = params["lm_norm"]["scale"].astype("float32")
    params["mm_norm"]["scale"] = params["mm_norm"]["scale"].at[0].set(math.nan)
    save_component(other, "transformer", params, model.config("transformer"))
    shutil.rmtree(other / "t5")
    found = {d.name: d for d in compare(open_view(converted[0]), open_view(other))}
    assert set(found) == {"transformer/language/mlp/up_proj/kernel", "transformer/lm_norm/scale", "transformer/mm_norm/scale", "t5"}
    d = found["transformer/language/mlp/up_proj/kernel"]
    largest = float(np.abs(np.asarray(kernel, np.float32)).max())
    assert d.count == 2 and abs(d.absolute - 0.5) < 4e-3 and abs(d.relative - d.absolute / largest) < 1e-6
    assert (found["transformer/lm_norm/scale"].count, found["transformer/lm_norm/scale"].note) == (0, "bfloat16 and float32")
    assert found["transformer/mm_norm/scale"].count == 1 and found["transformer/mm_norm/scale"].absolute == math.inf
    assert found["t5"].note == f"only in {converted[0]}"
    assert jax.tree.leaves(params) and open_sharded
