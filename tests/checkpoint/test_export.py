"""Converted and exported again, every tensor has the bytes it had, under its name, in a file of its kind."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.test_convert import START, arrays_of, same
from tests.miniature import random_params
from xomni_jax.checkpoint import export as module
from xomni_jax.checkpoint.conversion import ConversionError, flatten
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export
from xomni_jax.checkpoint.store import CheckpointError, save_component
from xomni_jax.checkpoint.tensors import open_sharded, open_tensor_file

DROPPED = {k for k in dirs.vit(dirs.SMALL["vit"]) if k.startswith(("norm.", "attn_pool", "head"))}
FOLDERS = {"": "", "mmdit": "mmdit", "flux/vae": "vae", "flux/text_encoder": "text_encoder", "flux/text_encoder_2": "text_encoder_2"}


def read(file):
    return {key: np.array(file.read(key)) for key in file.infos}


def pairs(released, back, pth=False):
    """(name, released tensors, exported tensors) of every file or folder of shards."""
    for ours, theirs in FOLDERS.items():
        yield ours, read(open_sharded((released[1] if ours.startswith("flux") else released[0]) / theirs)), read(open_sharded(back / ours))
    for name in ("siglip2_giant", "projector"):
        original = read(open_tensor_file(released[0] / "vit" / f"{name}.pth"))
        yield (
            name,
            {k: v for k, v in original.items() if k not in DROPPED},
            read(open_tensor_file(back / "vit" / f"{name}.{'pth' if pth else 'safetensors'}")),
        )


@pytest.mark.parametrize("pth", [False, True])
def test_every_tensor_comes_back(pth, released, converted, tmp_path):
    lines = []
    export(converted[0], tmp_path / "back", pth=pth, shard_bytes=30_000, say=lines.append)
    for name, theirs, ours in pairs(released, tmp_path / "back", pth):
        same(theirs, ours)
    assert not (tmp_path / "back.part").exists() and len(lines) == 7
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", released[0]))
    if not pth:
        for key in ("siglip_path", "projector_path"):
            config["vision_config"]["encoder"][key] = config["vision_config"]["encoder"][key].replace(".safetensors", ".pth")
    assert original.items() <= config.items()
    for ours, theirs in list(FOLDERS.items())[1:]:
        back, was = (
            json.loads((f / "config.json").read_text())
            for f in (tmp_path / "back" / ours, (released[1] if "flux" in ours else released[0]) / theirs)
        )
        assert was.items() <= back.items(), ours
    scheduler = json.loads((tmp_path / "back" / "flux" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.items() >= dirs.SCHEDULER.items()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (released[0] / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back" / "flux" / "tokenizer_2" / "tokenizer_config.json").read_text()) == {"which": "tokenizer_2"}


def test_the_export_converts_to_the_same_model(converted, tmp_path):
    export(converted[0], tmp_path / "back", say=list)
    convert(tmp_path / "back", tmp_path / "back" / "flux", tmp_path / "again", say=list)
    for name in ("transformer", "siglip_vq", "mmdit", "autoencoder", "t5", "clip"):
        same(arrays_of(tmp_path / "again", name), arrays_of(converted[0], name))
        assert xomni_jax.load(tmp_path / "again").config(name) == xomni_jax.load(converted[0]).config(name)
    data = [json.loads((folder / "model.json").read_text()) for folder in (tmp_path / "again", converted[0])]
    assert data[0]["settings"] == data[1]["settings"]


def test_a_trained_model_is_exported_without_an_original(model_dir, tmp_path):
    """The miniature: no released config to copy, sizes of its own, an identity autoencoder, Orbax's own arrays."""
    lines = []
    export(model_dir, tmp_path / "back", say=lines.append)
    assert "autoencoder: the identity kind has no weights and no released form; left out" in lines
    assert any("gives data, not velocity" in line for line in lines)
    convert(tmp_path / "back", None, tmp_path / "again", say=list)
    convert(None, tmp_path / "back" / "flux", tmp_path / "again", only="text", say=list)  # it holds no VAE
    for name in ("transformer", "siglip_vq", "mmdit", "t5", "clip"):
        same(arrays_of(tmp_path / "again", name), arrays_of(model_dir, name))
    ours, theirs = (xomni_jax.load(folder) for folder in (tmp_path / "again", model_dir))
    for name in ("transformer", "siglip_vq", "mmdit"):
        how = ("unroll", "query_chunk", "attention_chunk", "norm_eps", "remat", "microbatch")
        a, b = ({k: v for k, v in vars(m.config(name)).items() if k not in how} for m in (ours, theirs))
        assert a == b, name
    assert ours.decode_config.steps == theirs.decode_config.steps == 2 and ours.preprocess_config == theirs.preprocess_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_is_asked_for(dtype, released, converted, tmp_path):
    export(converted[0], tmp_path / "back", dtype, "tokenizer", say=list)
    original = read(open_tensor_file(released[0] / "vit" / "projector.pth"))
    same(
        read(open_tensor_file(tmp_path / "back" / "vit" / "projector.safetensors")),
        {k: v.astype(np.dtype(dtype)) for k, v in original.items()},
    )
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "vit"]


def test_plain_models_are_exported_as_xomni(tmp_path):
    convert(dirs.write_qwen(tmp_path / "qwen"), None, tmp_path / "out", parts=START, say=list)
    convert(dirs.write_siglip(tmp_path / "siglip"), None, tmp_path / "out", parts=START, say=list)
    export(tmp_path / "out", tmp_path / "back", say=list)
    language, tensors = read(open_sharded(tmp_path / "qwen")), read(open_sharded(tmp_path / "back"))
    assert (
        tensors["model.layers.3.mlp.up_proj.weight"].tobytes() == language["model.layers.1.mlp.up_proj.weight"].tobytes()
    )  # behind two adapters
    assert set(tensors) == set(dirs.ar(dirs.SMALL["ar"] | dict(adapters=2, tail=1)))
    vit = read(open_tensor_file(tmp_path / "back" / "tokenizer_vit" / "siglip.safetensors"))
    q = read(open_sharded(tmp_path / "siglip"))["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(vit["blocks.1.attn.qkv.weight"][:96], q)
    convert(tmp_path / "back", None, tmp_path / "again", say=list)
    assert xomni_jax.load(tmp_path / "again").config("siglip_vq").heads == 3  # no released name says so: the export does


def test_stacks_in_one_piece_are_unpacked_once(tmp_path, monkeypatch):
    """What a training run saved: whole stacks per file, read layer by layer."""
    from xomni_jax.checkpoint import orbax_reader
    from xomni_jax.models.transformer import ARConfig

    monkeypatch.setattr(orbax_reader, "SMALL", 100)
    cfg = ARConfig(
        vocab_size=23,
        mm_vocab_size=19,
        image_vocab_size=13,
        d_model=20,
        mlp_dim=28,
        n_heads=6,
        n_kv_heads=2,
        head_dim=4,
        n_language_layers=3,
        n_adapter_layers=1,
        n_head_layers=2,
    )
    params = random_params("transformer", cfg, 3)
    save_component(tmp_path / "model", "transformer", params, cfg)
    export(tmp_path / "model", tmp_path / "back", say=list)
    flat, tensors = flatten(params), read(open_sharded(tmp_path / "back"))
    np.testing.assert_array_equal(tensors["model.layers.3.mlp.gate_proj.weight"], np.asarray(flat["language/mlp/gate_proj/kernel"])[2].T)
    assert jnp.asarray(tensors["lm_head.weight"]).shape == (23, 20) and sorted(os.listdir(tmp_path / "back")) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_cannot_be_exported(converted, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(ConversionError, match="full: is there already; choose another --to"):
        export(converted[0], tmp_path / "full", say=list)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        export(tmp_path / "nowhere", tmp_path / "back", say=list)
    monkeypatch.setattr(module, "write_torch_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export(converted[0], tmp_path / "back", pth=True, say=list)
    assert sorted(os.listdir(tmp_path)) == ["full"]


def test_a_part_that_is_not_there(tmp_path, released):
    convert(None, released[1], tmp_path / "out", only="vae", say=list)
    with pytest.raises(CheckpointError, match=r"out: has no transformer \(it has autoencoder\)"):
        export(tmp_path / "out", tmp_path / "back", only="transformer", say=list)
    export(tmp_path / "out", tmp_path / "back", say=list)
    assert sorted(os.listdir(tmp_path / "back")) == ["flux"] and {
        v.dtype for v in read(open_sharded(tmp_path / "back/flux/vae")).values()
    } == {np.dtype(ml_dtypes.bfloat16)}
