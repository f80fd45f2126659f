"""What cannot be converted is said in one sentence with the file and key, or as a list of all that is wrong; nothing is written."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.writing import write_safetensors, write_torch_file
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.conversion_plan import make_plan
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.formats import detect_format
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.released import open_release
from xomni_jax.checkpoint.tensors import open_sharded, open_tensor_file


def refused(tmp_path, *arguments, **options):
    """The message of a conversion that must not begin."""
    with pytest.raises(ConversionError) as error:
        convert(*arguments, tmp_path / "refused", **options, say=list)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.part").exists()
    return str(error.value)


def tensors(folder):
    file = open_sharded(folder)
    return {k: np.array(file.read(k)) for k in file.infos}


def rewrite(folder, change, stem="model"):
    """The folder's tensors after `change`, in one file."""
    found = change(tensors(folder))
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    write_safetensors(folder, found, name=stem)


# ---- directories ----
def test_kinds(released, tmp_path):
    assert [detect_format(folder) for folder in released] == ["xomni", "flux"]
    assert detect_format(dirs.write_qwen(tmp_path / "q")) == "qwen2" and detect_format(dirs.write_siglip(tmp_path / "s")) == "siglip2"


@pytest.mark.parametrize(
    "files, words",
    [
        ({"adapter_config.json": {}, "adapter_model.safetensors": {}}, "is a LoRA; merge it into its base model first"),
        ({"pytorch_lora_weights.safetensors": {}}, "is a LoRA; merge it"),
        ({"model-q4.gguf": {}}, r"is a GGUF model \(quantised for llama.cpp\); give the safetensors it was made from"),
        (
            {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
            r"is a diffusers pipeline \(StableDiffusionPipeline\); only FLUX.1-dev's",
        ),
        ({"model.json": {}}, "is already a model directory of this package; use it as it is"),
        ({"config.json": {"model_type": "llama"}}, r"is a llama; X-Omni, Qwen2.5 \(qwen2\), SigLIP2 and FLUX.1-dev are read"),
        ({"config.json": {"model_type": "qwen2_5_vl"}}, "is a qwen2_5_vl; X-Omni"),
        ({"config.json": []}, "config.json: is no JSON object"),
        ({"README.md": {}}, "holds no config.json; give the directory of a downloaded checkpoint"),
    ],
)
def test_directories_that_are_something_else(files, words, tmp_path):
    for name, data in files.items():
        dirs.write_json(tmp_path / "it" / name, data)
    with pytest.raises(ConversionError, match=words) as error:
        detect_format(tmp_path / "it")
    assert "\n" not in str(error.value) and str(tmp_path / "it") in str(error.value)


def test_paths_that_are_no_directories(tmp_path, released):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file: is a file; give the directory"):
        detect_format(tmp_path / "file")
    with pytest.raises(ConversionError, match="nowhere: no such directory"):
        detect_format(tmp_path / "nowhere")
    assert f"{released[1]}: is FLUX.1-dev; give it as --flux" == refused(tmp_path, released[1], None)
    assert f"{released[0]}: is X-Omni, not FLUX.1-dev; give it as --xomni" == refused(tmp_path, None, released[0])
    assert "--only vae: the given directories hold no autoencoder; give --flux" == refused(tmp_path, released[0], None, only="vae")


# ---- files ----
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_missing_shard_is_named(copies, tmp_path):
    shard = sorted(copies[0].glob("model-*.safetensors"))[1]
    shard.unlink()
    told = refused(tmp_path, *copies)
    assert f"{shard}: no such file" in told and "model.safetensors.index.json" in told


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00004.safetensors",
        "vit/siglip2_giant.pth",
        "vit/projector.pth",
        "mmdit/diffusion_pytorch_model-00001-of-00003.safetensors",
    ],
)
def test_a_cut_file_is_named(name, copies, tmp_path):
    cut(copies[0] / name)
    assert str(copies[0] / name) in refused(tmp_path, *copies)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(vision_config__encoder__siglip_path="vit/gone.pth"),
            "vit/gone.pth: no such file, but config.json names it as vision_config.encoder.siglip_path",
        ),
        (dict(vision_config__encoder__siglip_path="/etc/passwd"), "siglip_path='/etc/passwd' is no path within the directory"),
        (
            dict(vision_config__decoder__model_path="../flux/transformer"),
            "model_path='../flux/transformer' is no path within the directory",
        ),
        (
            dict(vision_config__encoder__siglip_name="vit_huge"),
            "siglip_name='vit_huge' is unknown, and no tensor shows its head count; known: siglip2_giant",
        ),
        (dict(vision_config__encoder__codebook_dim=11), "codebook_dim=11, but the tensors have 10"),
        (dict(vision_config__encoder__siglip_name=None), "vision_config.encoder.siglip_name is missing"),
        (dict(vision_config__dtype="half"), "vision_config.dtype='half' is not supported"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling.rope_type='yarn' is not supported, only 'default'"),
        (dict(num_attention_heads=None), "num_attention_heads is missing; take the config of the same checkpoint"),
        (dict(num_attention_heads="six"), "num_attention_heads='six' is no size"),
        (dict(num_key_value_heads=4), "n_heads=6 is not a multiple of n_kv_heads=4"),
        (dict(num_hidden_layers=3), "num_hidden_layers=3 leaves no language layer between 1 adapters and 2 heads"),
    ],
)
def test_a_config_that_cannot_be(change, words, copies, tmp_path):
    dirs.edit_config(copies[0], **change)
    told = refused(tmp_path, *copies)
    assert words in told and "\n" not in told and str(copies[0]) in told


@pytest.mark.parametrize(
    "folder, change, words",
    [
        ("vae", dict(use_quant_conv=True), "use_quant_conv=True is not supported"),
        ("vae", dict(block_out_channels="wide"), "block_out_channels='wide' is no list of sizes"),
        ("text_encoder", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'quick_gelu'"),
        ("text_encoder_2", dict(feed_forward_proj="relu"), "feed_forward_proj='relu' is not supported, only 'gated-gelu'"),
        ("text_encoder_2", dict(d_ff=23), "shape (14, 22) after [O,I] -> [I,O], layers/gate/kernel wants (14, 23)"),
    ],
)
def test_a_config_of_flux_that_cannot_be(folder, change, words, copies, tmp_path):
    dirs.edit_config(copies[1] / folder, **change)
    assert words in refused(tmp_path, *copies)


def test_a_config_that_is_cut(copies, tmp_path):
    cut(copies[0] / "config.json")
    assert f"{copies[0]}/config.json: not readable as JSON" in refused(tmp_path, *copies)


# ---- tensors ----
def test_every_problem_is_told_at_once(copies, tmp_path):
    xomni, flux = copies

    def spoil(t):
        del t["model.layers.3.mlp.up_proj.weight"]
        t["model.layers.0.self_attn.q_proj.weight"] = t["model.layers.0.self_attn.q_proj.weight"][:-4]
        t["model.layers.1.mlp.down_proj.weight"] = t["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
        return t | {"model.extra.weight": np.zeros((2, 3), np.float32)}

    rewrite(xomni, spoil)
    rewrite(flux / "vae", lambda t: {k: v for k, v in t.items() if k != "decoder.conv_in.bias"}, "diffusion_pytorch_model")
    file, told = f"{xomni}/model.safetensors", refused(tmp_path, xomni, flux)
    assert told.splitlines()[0] == "4 problems:" and len(told.splitlines()) == 5
    assert f"  {file}: model.extra.weight: in the checkpoint, no rule takes it" in told
    assert f"  {xomni}: model.layers.3.mlp.up_proj.weight: missing from the checkpoint" in told
    misfit = "shape (20, 5, 4) after [O,I] -> [I,6,4], adapters/attn/q_proj/kernel wants (20, 6, 4)"
    assert f"  {file}: model.layers.0.self_attn.q_proj.weight: {misfit}" in told or "cannot be turned" in told
    assert f"  {flux}/vae: decoder.conv_in.bias: missing from the checkpoint" in told


def test_mixed_dtypes_within_a_stack(copies, tmp_path):
    rewrite(copies[0], lambda t: t | {"model.layers.2.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"].astype(np.float32)})
    told = refused(tmp_path, *copies, only="transformer")
    key = f"{copies[0]}/model.safetensors: model.layers.2.mlp.up_proj.weight"
    assert told == f"{key}: float32, but bfloat16 in other layers of language/mlp/up_proj/kernel; choose one with --dtype"
    convert(*copies, tmp_path / "out", "bfloat16", "transformer", say=list)


@pytest.mark.parametrize(
    "dtype, words",
    [
        (np.int8, "int8, whole numbers or 8-bit floats are quantised weights"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn, whole"),
        (np.float64, "float64 is not kept; choose --dtype"),
    ],
)
def test_dtypes_that_are_not_kept(dtype, words, copies, tmp_path):
    rewrite(copies[0], lambda t: t | {"lm_head.weight": t["lm_head.weight"].astype(dtype)})
    told = refused(tmp_path, *copies)
    assert f"{copies[0]}/model.safetensors: lm_head.weight: {words}" in told and "\n" not in told


def test_values_that_are_no_numbers_are_warned_of(copies, tmp_path):
    def spoil(t):
        for key, value in (("model.layers.4.mlp.up_proj.weight", np.nan), ("mm_head.weight", -np.inf)):
            t[key][3, 2] = value
        return t

    rewrite(copies[0], spoil)
    warnings = convert(*copies, tmp_path / "out", only="transformer", say=list)
    file = f"{copies[0]}/model.safetensors"
    assert warnings == [
        f"{file}: mm_head.weight: holds values that are infinite",
        f"{file}: model.layers.4.mlp.up_proj.weight: holds values that are NaN",
    ]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["not_finite"] == {
        f"{file}: mm_head.weight": "infinite",
        f"{file}: model.layers.4.mlp.up_proj.weight": "NaN",
    }


def test_a_lora_in_place_of_the_vit(copies, tmp_path):
    write_torch_file(copies[0] / "vit" / "siglip2_giant.pth", {"blocks.0.attn.qkv.lora_A.weight": np.zeros((2, 3), np.float32)})
    assert f"{copies[0]}/vit/siglip2_giant.pth: holds only LoRA matrices" in refused(tmp_path, *copies)


def test_a_vit_without_what_sizes_are_read_from(copies, tmp_path):
    write_torch_file(copies[0] / "vit" / "siglip2_giant.pth", {"encoder.weight": np.zeros((2, 3), np.float32)})
    assert f"{copies[0]}/vit/siglip2_giant.pth: patch_embed.proj.weight: missing from the checkpoint" in refused(tmp_path, *copies)


def test_positions_that_are_no_square(copies, tmp_path):
    shapes = dirs.vit(dirs.SMALL["vit"]) | {"pos_embed": (1, 24, 96)}
    write_torch_file(copies[0] / "vit" / "siglip2_giant.pth", dirs.drawn(shapes, np.float32))
    assert "pos_embed: 24 positions are no square grid" in refused(tmp_path, *copies)


def test_a_language_model_with_a_short_embedding(tmp_path):
    """A tokenizer that knows more ids than the embedding has rows."""
    dirs.write_qwen(tmp_path / "q")
    tokenizer = json.loads((tmp_path / "q" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 400, "content": "<more>"})
    dirs.write_json(tmp_path / "q" / "tokenizer.json", tokenizer)
    assert "tokenizer.json: uses ids up to 400, the embedding has 384 rows" in refused(tmp_path, tmp_path / "q", None)
    (tmp_path / "q" / "tokenizer.json").unlink()
    assert "q/tokenizer.json: no such file, image tokens cannot be added" in refused(tmp_path, tmp_path / "q", None)


def test_rotary_buffers_and_ranges_are_dropped_by_name(copies):
    rewrite(copies[0], lambda t: t | {"model.rotary_emb.inv_freq": np.ones(2, np.float32)})
    rewrite(copies[1] / "text_encoder", lambda t: t | {"text_model.embeddings.position_ids": np.arange(11)[None]})
    rewrite(copies[1] / "text_encoder_2", lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"]})
    assert set(make_plan(open_release(*copies)).params) == {"transformer", "siglip_vq", "mmdit", "autoencoder", "t5", "clip"}


@pytest.mark.parametrize("wrapper", ["state_dict.", "module.visual."])
def test_wrappers_around_the_tensors(wrapper, copies, converted, tmp_path):
    """A training script's {"state_dict": ...} is looked through."""
    for name in ("siglip2_giant", "projector"):
        path = copies[0] / "vit" / f"{name}.pth"
        file = open_tensor_file(path)
        write_torch_file(path, {wrapper + k: np.array(file.read(k)) for k in file.infos})
    convert(copies[0], None, tmp_path / "out", only="tokenizer", say=list)
    for path, array in OrbaxReader(tmp_path / "out" / "siglip_vq").arrays.items():
        ours, theirs = (OrbaxReader(folder / "siglip_vq").read(path) for folder in (tmp_path / "out", converted[0]))
        assert array.shape == ours.shape and ours.tobytes() == theirs.tobytes()


def test_t5_by_its_second_name(copies, tmp_path):
    rewrite(copies[1] / "text_encoder_2", lambda t: {k.replace("shared.weight", "encoder.embed_tokens.weight"): v for k, v in t.items()})
    convert(*copies, tmp_path / "out", only="text", say=list)


def test_an_xomni_without_vision(copies, tmp_path):
    """A directory of the language part alone is read as far as it goes."""
    dirs.edit_config(copies[0], vision_config=None)
    shutil.rmtree(copies[0] / "mmdit")
    release = open_release(copies[0], None)
    assert set(release.components) == {"transformer"} and len(release.notes) == 2
    assert release.notes[1] == f"{copies[0]}/config.json: no vision_config.decoder, so no decoder is read"
