"""What a checkpoint is said to hold, and how two are said to differ."""

import math
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from xomni_jax.checkpoint.inspection import compare, describe, open_view
from xomni_jax.checkpoint.store import save_component
from xomni_jax.checkpoint.tensors import open_sharded
from xomni_jax.cli.main import main


def test_a_model_directory_is_described(converted):
    lines = list(describe(open_view(converted[0])))
    assert lines[0] == f"{converted[0]}: model directory" and lines[-1] == "missing: nothing"
    assert f"transformer: {dirs.total(dirs.ar(dirs.SMALL['ar'])):,} parameters in 42 arrays, 69 KB, bfloat16" in lines
    assert f"autoencoder: {dirs.total(dirs.vae(dirs.SMALL['vae'])):,} parameters in 196 arrays, 393 KB, bfloat16" in lines
    assert any(line.startswith("  ") and "rope_theta=1000000.0" in line for line in lines)
    assert "settings.decode: base_shift=0.25, guidance=1.5, max_shift=1.25, pooled_length=11, steps=7" in lines


def test_released_directories_are_described(released):
    lines = list(describe(open_view(released[0])))
    assert lines[0] == f"{released[0]}: released X-Omni" and lines[-1] == "missing: autoencoder, t5, clip"
    assert "siglip_vq: 433,084 parameters in 36 arrays, 1.73 MB, float32" in lines
    lines = list(describe(open_view(released[1])))
    assert lines[0] == f"{released[1]}: FLUX.1-dev" and lines[-1] == "missing: transformer, siglip_vq, tokenizer"


def test_the_shipped_model_is_described():
    lines = list(describe(open_view("xomni_jax/assets/tiny_sft")))
    assert (
        any(line.startswith("autoencoder: 0 parameters in 0 arrays, 0 B, no parameters") for line in lines)
        and lines[-1] == "missing: nothing"
    )


def largest_values(folder):
    """The file that holds most of a component's values."""
    return max(folder.glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


DAMAGE = {
    "the list of arrays is gone": (lambda folder: (folder / "_METADATA").unlink(), "cannot be read"),
    "the list of arrays is empty": (lambda folder: (folder / "_METADATA").write_text(""), "cannot be read"),
    "a file of values is gone": (lambda folder: largest_values(folder).unlink(), "/d/[0-9a-f]+ is missing"),
    "a file of values is cut": (lambda folder: os.truncate(largest_values(folder), 300), "/d/[0-9a-f]+ is cut off"),
    "the tree of values is gone": (lambda folder: shutil.rmtree(folder / "d"), "cannot be read"),
    "the manifest is cut": (lambda folder: os.truncate(folder / "manifest.ocdbt", 40), "cannot be read"),
    "all of it is gone": (shutil.rmtree, "this model directory has no clip"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_part_is_said(what, converted, tmp_path, capsys, monkeypatch):
    spoil, words = DAMAGE[what]
    monkeypatch.setattr(sys, "argv", ["xomni"])
    broken = shutil.copytree(converted[0], tmp_path / "model")
    spoil(broken / "clip")
    assert main(["inspect", str(broken)]) == 2
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "missing: nothing; damaged: clip" and "transformer: " in told.out
    assert re.search(rf"^xomni inspect: clip: {broken}/clip: .*{words}", told.err) and told.err.count("\n") == 1
    assert main(["inspect", str(converted[0]), "--diff", str(broken)]) == 2


def test_a_damaged_part_of_a_released_directory_is_said(released, tmp_path):
    spoilt = shutil.copytree(released[0], tmp_path / "x")
    (spoilt / "vit" / "projector.pth").unlink()
    view = open_view(spoilt)
    assert list(describe(view))[-1].endswith("; damaged: siglip_vq") and "projector.pth" in view.faults["siglip_vq"]
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
