"""A model directory is identified by its weights alone, and a wrong one is named in one sentence."""

import hashlib

import pytest

from xomni_jax.rewards.model_files import file_hash, model_directory, model_hash
from xomni_jax.rewards.scorer import ServiceError


def test_hash_depends_on_the_weights_alone(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "model-2.safetensors").write_bytes(b"two")
        (folder / "model-1.safetensors").write_bytes(b"one")
    (there / "README.md").write_text("not a weight")
    same = model_hash(here)
    assert model_hash(there) == same and len(same) == 64
    (there / "model-1.safetensors").write_bytes(b"ONE")
    assert model_hash(there) != same
    (there / "model-1.safetensors").rename(there / "model-3.safetensors")
    (there / "model-3.safetensors").write_bytes(b"one")
    assert model_hash(there) != same  # another name is another shard
    assert model_hash(here / "model-1.safetensors") != model_hash(here / "model-2.safetensors")
    assert file_hash(here / "model-1.safetensors") == hashlib.sha256(b"one").hexdigest()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ServiceError, match="scorer 'clip' needs --model DIR, a local copy of openai/clip; it was not given"):
        model_directory("clip", "--model", "", "openai/clip")
    with pytest.raises(ServiceError, match="nowhere is no directory"):
        model_directory("clip", "--model", str(tmp_path / "nowhere"), "openai/clip")
    with pytest.raises(ServiceError, match=r"holds no weights \(\*\.safetensors"):
        model_hash(tmp_path)
