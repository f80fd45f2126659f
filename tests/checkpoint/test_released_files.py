"""Published checkpoints that are one file: what they hold is found by names, sizes by shapes; what they are not is said."""

from __future__ import annotations

import numpy as np
import pytest

import xomni_jax
from tests import name_tables
from tests.checkpoint.writing import write_torch_file
from tests.models import golden
from tests.parity.reference_llamagen_vq import SIZES
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.names import llamagen_vq


@pytest.fixture(autouse=True)
def few_groups(monkeypatch):
    """Every published file has 32 groups, which no tensor shows."""
    monkeypatch.setattr("xomni_jax.checkpoint.released_files.GROUPS", SIZES["groups"])


def vq_16(**changes) -> dict[str, np.ndarray]:
    """The golden's tokenizer as a published file holds it."""
    arrays = golden.part(golden.load("llamagen_vq"), "w")
    return {f"model.{key}": value for key, value in arrays.items()} | {"model.quantize.codebook_used": np.zeros(9, np.float32)} | changes


@pytest.fixture
def file(tmp_path):
    write_torch_file(tmp_path / "vq.pt", vq_16())
    return tmp_path / "vq.pt"


def test_llamagen_vq(file, tmp_path):
    """The golden's file becomes a model whose codes and pixels are the golden's; by its own table it becomes the file again."""
    convert(file, None, tmp_path / "model", say=list)
    model, want = xomni_jax.load(tmp_path / "model"), golden.part(golden.load("llamagen_vq"), "out")
    cfg = model.config("llamagen_vq")
    assert all(getattr(cfg, name) == value for name, value in SIZES.items() if name != "entropy_weight")
    codes = np.asarray(model.encode_pixels(golden.load("llamagen_vq")["in/pixels"]))
    np.testing.assert_array_equal(codes, want["codes"])
    images = np.stack([np.asarray(image) for image in model.decode(codes)])
    np.testing.assert_array_equal(images, np.round((np.clip(want["pixels"], -1, 1) + 1) * 127.5).astype(np.uint8))
    back = name_tables.to_tensors(model.params("llamagen_vq"), llamagen_vq.table(cfg))
    assert back.keys() == {key.removeprefix("model.") for key in vq_16()} - {"quantize.codebook_used"}
    for key, value in back.items():
        np.testing.assert_array_equal(value, vq_16()[f"model.{key}"], err_msg=key)


def test_a_file_of_another_model_is_refused(tmp_path):
    write_torch_file(tmp_path / "other.pt", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(ConversionError, match="other.pt: is not a tokenizer or a class-conditional model of LlamaGen") as error:
        convert(tmp_path / "other.pt", None, tmp_path / "model", say=list)
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_widths_that_do_not_fit_are_refused(file, tmp_path, monkeypatch):
    monkeypatch.setattr("xomni_jax.checkpoint.released_files.GROUPS", 32)
    with pytest.raises(ConversionError, match="vq.pt: LlamaGenVQConfig: a width of 4 does not divide into groups=32"):
        convert(file, None, tmp_path / "model", say=list)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = vq_16()
    del tensors["model.decoder.mid.1.q.weight"]
    write_torch_file(tmp_path / "vq.pt", tensors)
    with pytest.raises(ConversionError, match=r"vq.pt: decoder.mid.1.q.weight: missing from the checkpoint"):
        convert(tmp_path / "vq.pt", None, tmp_path / "model", say=list)
