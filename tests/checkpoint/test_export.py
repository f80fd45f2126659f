"""Converted and exported again, every tensor has the bytes it had, under its name, in a file of its kind."""

import dataclasses
import errno
import json
import os
import shutil
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import published
from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.test_convert import START, arrays_of, same
from tests.miniature import random_params
from xomni_jax.checkpoint import export as module
from xomni_jax.checkpoint.conversion import ConversionError, flatten
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export
from xomni_jax.checkpoint.official import limits
from xomni_jax.checkpoint.store import CheckpointError, save_component, save_settings
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.models.section import COMPUTATION
from xomni_jax.models.transformer import PRESETS
from xomni_jax.sampling.decoder import DecodeConfig

DROPPED = {k for k in dirs.vit(dirs.SMALL["vit"]) if k.startswith(("norm.", "attn_pool", "head"))}


@pytest.mark.parametrize("safetensors", [False, True])
def test_every_tensor_and_every_config_comes_back(safetensors, released, converted, tmp_path):
    lines, back = [], tmp_path / "back"
    export(converted[0], back, safetensors=safetensors, shard_bytes=30_000, say=lines.append)
    theirs, ours = published.whole(*released), published.whole(back)
    for key in DROPPED:
        del theirs["siglip_path"][key]
    assert set(ours) == set(theirs)
    for part in theirs:
        same(ours[part], theirs[part])
    configs = published.configs(back)
    if safetensors:
        for key in ("siglip_path", "projector_path"):
            configs["config.json"]["vision_config"]["encoder"][key] = configs["config.json"]["vision_config"]["encoder"][key].replace(
                ".safetensors", ".pth"
            )
    assert configs == published.configs(*released)
    assert not (tmp_path / "back.part").exists() and lines[:2] == [
        "transformer: 78 tensors in 3 files",
        f"siglip_vq: 27 tensors in {lines[1].split()[-1]}",
    ]
    assert (back / "tokenizer.json").read_bytes() == (released[0] / "tokenizer.json").read_bytes()
    assert published.read_json(back / "flux" / "tokenizer_2" / "tokenizer_config.json") == {"which": "tokenizer_2"}


def test_the_export_converts_to_the_same_model(converted, tmp_path):
    export(converted[0], tmp_path / "back", say=list)
    convert(tmp_path / "back", tmp_path / "back" / "flux", tmp_path / "again", say=list)
    for name in ("transformer", "siglip_vq", "mmdit", "autoencoder", "t5", "clip"):
        same(arrays_of(tmp_path / "again", name), arrays_of(converted[0], name))
        assert xomni_jax.load(tmp_path / "again").config(name) == xomni_jax.load(converted[0]).config(name)
    data = [json.loads((folder / "model.json").read_text()) for folder in (tmp_path / "again", converted[0])]
    assert data[0]["settings"] == data[1]["settings"]


def test_a_trained_model_that_was_never_published_comes_back_and_draws_as_before(model_dir, tmp_path):
    """The miniature: sizes, text lengths and an identity autoencoder of its own, Orbax's own arrays."""
    lines = []
    export(model_dir, tmp_path / "back", say=lines.append)
    told = next(line for line in lines if "published code cannot run" in line)
    for words in (
        "siglip_vq with heads=2 (16), patch=8 (16)",
        "mmdit with prediction=data (velocity)",
        "autoencoder with kind=identity (kl)",
    ):
        assert words in told
    assert told.endswith("(what it takes is in brackets); it runs the transformer alone (text and codes), this package runs all")
    alone = "its VAE is the identity and its text encoders read the ids of the text tokenizer"
    assert f"flux: is read by this package alone, diffusers has no such parts: {alone}" in lines
    assert not (tmp_path / "back" / "flux" / "model_index.json").exists()
    convert(tmp_path / "back", None, tmp_path / "again", say=list)
    ours, theirs = (xomni_jax.load(folder) for folder in (tmp_path / "again", model_dir))
    for name in ("transformer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder"):
        a, b = ({k: v for k, v in vars(m.config(name)).items() if k not in (*COMPUTATION, "norm_eps")} for m in (ours, theirs))
        assert a == b, name
        if name != "autoencoder":
            same(arrays_of(tmp_path / "again", name), arrays_of(model_dir, name))
    assert ours.decode_config == theirs.decode_config
    assert ours.description["settings"].keys() == theirs.description["settings"].keys()
    np.testing.assert_array_equal(*(np.asarray(m.generate("a red sign", seed=3)[0]) for m in (ours, theirs)))


def test_a_transformer_of_another_order_is_not_said_to_run():
    """The published code would draw its codes row by row."""
    told = limits({"transformer": dataclasses.replace(PRESETS["tiny"], order="spanning_tree")}, DecodeConfig())
    assert "transformer with order=spanning_tree (raster)" in told and told.endswith("; this package runs it")
    assert limits({"transformer": PRESETS["tiny"]}, DecodeConfig()) is None


def test_what_a_run_changes_is_changed_in_the_config(converted, tmp_path):
    """Other guidance, steps and image limits; the literals of all else stay, and the pipeline's two guidances agree."""
    model = shutil.copytree(converted[0], tmp_path / "model")
    save_settings(model, decode=DecodeConfig(steps=9, guidance=2.5, max_shift=1.25, base_shift=0.25, pooled_length=11))
    save_settings(model, preprocess=ImageLimits(patch_size=4, long_size=640))
    export(model, tmp_path / "back", say=list)
    expected = dirs.xomni_config(dirs.SMALL)
    expected["vision_config"]["decoder"] |= {"num_inference_steps": 9, "cfg_scale": 2.5, "cfg_scale_2": 2.5}
    expected["vision_config"]["transform"] |= {"long_size": 640}
    assert published.read_json(tmp_path / "back" / "config.json") == expected


def test_a_guidance_that_the_published_pipeline_refuses_is_said(converted, tmp_path):
    model, lines = shutil.copytree(converted[0], tmp_path / "model"), []
    save_settings(model, decode=DecodeConfig(guidance=1.0))
    export(model, tmp_path / "back", only="decoder", say=lines.append)
    assert "mmdit with decode.guidance=1 (above 1) (what it takes is in brackets); this package runs it" in lines[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_is_asked_for(dtype, released, converted, tmp_path):
    export(converted[0], tmp_path / "back", dtype, "tokenizer", say=list)
    original = published.torch_file(released[0] / "vit" / "projector.pth")
    same(published.torch_file(tmp_path / "back" / "vit" / "projector.pth"), {k: v.astype(np.dtype(dtype)) for k, v in original.items()})
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "vit"]
    assert set(published.read_json(tmp_path / "back" / "config.json")["vision_config"]) == {"dtype", "encoder", "transform"}


def test_the_transformer_alone_keeps_the_whole_config(released, converted, tmp_path):
    """Its shards and config.json replace those of the released directory; the dtype is that of the tensors."""
    lines = []
    export(converted[0], tmp_path / "back", "float32", only="transformer", say=lines.append)
    config, original = (published.read_json(folder / "config.json") for folder in (tmp_path / "back", released[0]))
    assert config == original | {"torch_dtype": "float32"}
    assert "config.json: vision_config.encoder and decoder name files that are not part of this export" in lines


def test_plain_models_are_exported_as_xomni(tmp_path):
    convert(dirs.write_qwen(tmp_path / "qwen"), None, tmp_path / "out", parts=START, say=list)
    convert(dirs.write_siglip(tmp_path / "siglip"), None, tmp_path / "out", parts=START, say=list)
    export(tmp_path / "out", tmp_path / "back", say=list)
    language, tensors = published.folder(tmp_path / "qwen"), published.folder(tmp_path / "back")
    behind_two_adapters = tensors["model.layers.3.mlp.up_proj.weight"]
    assert behind_two_adapters.tobytes() == language["model.layers.1.mlp.up_proj.weight"].tobytes()
    assert set(tensors) == set(dirs.ar(dirs.SMALL["ar"] | dict(adapters=2, tail=1)))
    vit = published.torch_file(tmp_path / "back" / "tokenizer_vit" / "siglip.pth")
    q = published.folder(tmp_path / "siglip")["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
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
    flat, tensors = flatten(params), published.folder(tmp_path / "back")
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
    monkeypatch.setattr(module, "write_torch_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ConversionError, match="back: the disk is full; free some space or choose another disk"):
        export(converted[0], tmp_path / "back", say=list)
    assert sorted(os.listdir(tmp_path)) == ["full"]


@pytest.mark.parametrize("free, said", [(2_000_000, "2 MB"), (41_500, "41.5 KB"), (0, "0 B")])
def test_a_disk_that_is_too_small_is_said_before_anything_is_written(free, said, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    with pytest.raises(ConversionError, match=f"back: 3.[0-9]+ MB are to be written, {said} are free; free some space"):
        export(converted[0], tmp_path / "back", say=list)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spelling", ["./back/", "sub/../back", "link/back"])
def test_every_spelling_of_a_path(spelling, converted, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    export(converted[0], spelling, only="decoder", say=list)
    assert (tmp_path / "back" / "mmdit" / "config.json").is_file() and sorted(os.listdir(tmp_path)) == ["back", "link", "sub"]


def test_a_part_that_is_not_there(tmp_path, released):
    convert(None, released[1], tmp_path / "out", only="vae", say=list)
    with pytest.raises(CheckpointError, match=r"out: has no transformer \(it has autoencoder\)"):
        export(tmp_path / "out", tmp_path / "back", only="transformer", say=list)
    lines = []
    export(tmp_path / "out", tmp_path / "back", say=lines.append)
    assert (
        lines[-1]
        == "flux: diffusers opens it once text_encoder, text_encoder_2, tokenizer, tokenizer_2, transformer of FLUX.1-dev lie in it, too"
    )
    assert sorted(os.listdir(tmp_path / "back")) == ["flux"]
    assert {v.dtype for v in published.folder(tmp_path / "back/flux/vae", "diffusion_pytorch_model").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
