"""LlamaGen's class-conditional model: parity with the public code, rotary positions on a grid, images of numbered classes.

goldens/llamagen_c2i.npz holds weights, inputs and outputs of the public code (FoundationVision/LlamaGen ce98ec4) on small random weights:
3 layers of width 60 with 5 heads, 97 codes, 11 classes, a grid of 5 x 5.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import xomni_jax
from tests import name_tables
from tests.checkpoint.writing import write_safetensors, write_torch_file
from tests.miniature import configs, random_params
from tests.models import golden
from tests.models.llamagen_parity import compare_c2i
from xomni_jax.checkpoint.component_source import NewParts
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export
from xomni_jax.checkpoint.names import llamagen
from xomni_jax.models.transformer import ARConfig, ARTransformer, apply_rope, rope_table
from xomni_jax.training.components import export_model

PARTS = NewParts(heads=5, columns=5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden's file, converted."""
    folder = tmp_path_factory.mktemp("llamagen")
    write_torch_file(folder / "c2i.pt", {f"model.{key}": value for key, value in golden.part(golden.load("llamagen_c2i"), "w").items()})
    convert(folder / "c2i.pt", None, folder / "model", parts=PARTS, say=list)
    return xomni_jax.load(folder / "model")


def test_the_public_code(converted):
    want = golden.part(golden.load("llamagen_c2i"), "out")
    compare_c2i(ARTransformer(converted.config("transformer")), converted.params("transformer"), want, samples=("greedy_cfg",))


def test_the_way_back(converted):
    cfg, tensors = converted.config("transformer"), golden.part(golden.load("llamagen_c2i"), "w")
    back = name_tables.to_tensors(converted.params("transformer"), llamagen.table(cfg))
    for i in range(cfg.n_language_layers):
        parts = [back.pop(f"layers.{i}.attention.w{name}.weight") for name in "qkv"]
        back[f"layers.{i}.attention.wqkv.weight"] = np.concatenate(parts)
    np.testing.assert_array_equal(back.pop(llamagen.SAME_NORM), back["norm.weight"])
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert converted.description["settings"]["size"] == {"height": 80, "width": 80}


def test_positions_on_a_grid(rng):
    """Scores of two cells depend on the differences of their rows and of their columns alone; a condition has none."""
    cfg = ARConfig(3, 9, 9, 8, 8, 1, 1, 8, 1, 0, 0, rope_theta=10.0, grid_columns=4, condition_length=2)
    q, k = (jnp.broadcast_to(jnp.asarray(rng.normal(size=8), jnp.float32), (1, 14, 1, 8)) for _ in range(2))
    table = rope_table(cfg, jnp.arange(14)[None])
    scores = np.einsum("lh,sh->ls", apply_rope(q, *table)[0, :, 0], apply_rope(k, *table)[0, :, 0])
    assert not scores[:2].any() and not scores[:, :2].any()
    cells = scores[2:, 2:].reshape(3, 4, 3, 4)
    for dy, dx in ((0, 0), (1, 0), (0, 2), (1, 3), (2, 1)):
        same = [cells[y, x, y + dy, x + dx] for y in range(3 - dy) for x in range(4 - dx)]
        np.testing.assert_allclose(same, same[0], rtol=1e-5)
    assert abs(cells[0, 0, 1, 0] - cells[0, 0, 0, 1]) > 1e-3


def test_images_of_numbered_classes(tmp_path):
    """One command's worth: a class is drawn with guidance and decoded by the tokenizer's own decoder; what is no class is refused."""
    vq = configs()["llamagen_vq"]
    ar = dataclasses.replace(configs()["transformer"], vocab_size=4, mm_vocab_size=64, n_adapter_layers=0, n_head_layers=0, grid_columns=4)
    trained = {name: (random_params(name, cfg, 0), cfg) for name, cfg in (("transformer", ar), ("llamagen_vq", vq))}
    export_model(tmp_path / "model", trained, "", {})
    model = xomni_jax.load(tmp_path / "model")
    images = [np.asarray(x) for x in model.generate(["2", "0"], 6, 8, seed=1, guidance=1.5)]
    assert [x.shape for x in images] == [(6, 8, 3)] * 2 and not np.array_equal(*images)
    np.testing.assert_array_equal(model.generate(["2"], 6, 8, seed=1, guidance=1.5)[0], images[0])
    with pytest.raises(ValueError, match="The prompt '3' is no class of this model; give a number from 0 to 2"):
        model.generate(["3"], 6, 8)
    with pytest.raises(ValueError, match="draws images of 4 columns of codes, not 3"):
        model.generate(["1"], 8, 6)
    with pytest.raises(ValueError, match="answers no questions; use a model of text"):
        model.chat(images[0], "what is it?")
    with pytest.raises(ValueError, match="its transformer is not X-Omni's"):
        export(tmp_path / "model", tmp_path / "released", only="transformer")


def test_refusals(tmp_path):
    weights = golden.part(golden.load("llamagen_c2i"), "w")
    write_safetensors(tmp_path / "c2i", weights)
    with pytest.raises(ConversionError, match="60 columns in 3 layers are no published size; give the attention heads as --heads"):
        convert(tmp_path / "c2i" / "model.safetensors", None, tmp_path / "model", say=list)
    assert not (tmp_path / "model").exists()
