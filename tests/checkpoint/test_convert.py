"""A conversion gives the parameters that the tables say, whole or not at all, and tells what it did."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.writing import write_safetensors
from tests.miniature import ROOT
from tests.name_tables import to_params
from xomni_jax.checkpoint import convert as module
from xomni_jax.checkpoint.component_source import NewParts, wanted_shapes
from xomni_jax.checkpoint.conversion import ConversionError, flatten
from xomni_jax.checkpoint.conversion_plan import make_plan
from xomni_jax.checkpoint.conversion_report import plan_lines
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.names import autoencoder, clip, mmdit, siglip_vq, t5, transformer
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.released import open_release
from xomni_jax.checkpoint.store import read_model_json
from xomni_jax.checkpoint.tensors import open_sharded, open_tensor_file

TABLES = {"transformer": transformer, "siglip_vq": siglip_vq, "mmdit": mmdit, "autoencoder": autoencoder, "t5": t5, "clip": clip}
START = NewParts(image_vocab_size=13, mm_vocab_size=22, adapter_layers=2, head_layers=1, code_width=10)


def tensors_of(xomni, flux):
    """{component: {released key: tensor}}, read by file."""
    read = lambda file: {k: np.array(file.read(k)) for k in file.infos}  # noqa: E731
    vit = {f"vit.{k}": v for k, v in read(open_tensor_file(xomni / "vit" / "siglip2_giant.pth")).items()}
    projector = {f"vqproj.{k}": v for k, v in read(open_tensor_file(xomni / "vit" / "projector.pth")).items()}
    folders = {
        "transformer": xomni,
        "mmdit": xomni / "mmdit",
        "autoencoder": flux / "vae",
        "t5": flux / "text_encoder_2",
        "clip": flux / "text_encoder",
    }
    return {name: read(open_sharded(folder)) for name, folder in folders.items()} | {"siglip_vq": vit | projector}


def arrays_of(directory, name):
    stored = OrbaxReader(directory / name)
    return {path: stored.read(path) for path in stored.arrays}


def same(a, b):
    """Keys, dtypes and bytes."""
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes(), key


# ---- values ----
@pytest.mark.parametrize("name", TABLES)
def test_parameters_are_those_of_the_tables(name, released, converted):
    """Streamed in blocks, or made in memory by the tables that are tested against torch: the same bytes."""
    model = xomni_jax.load(converted[0])
    cfg = model.config(name)
    expected = flatten(to_params(tensors_of(*released)[name], TABLES[name].table(cfg), wanted_shapes(name, cfg)))
    same(arrays_of(converted[0], name), {k: np.ascontiguousarray(v) for k, v in expected.items()})
    same({k: np.asarray(v) for k, v in flatten(model.params(name)).items()}, expected)


def test_sizes_and_settings_come_from_the_files(converted):
    model = xomni_jax.load(converted[0])
    c = model.config("transformer")
    assert (c.n_adapter_layers, c.n_language_layers, c.n_head_layers, c.head_dim, c.rope_theta) == (1, 3, 2, 4, 1e6)
    assert c.dtype == c.param_dtype == jnp.bfloat16
    v = model.config("siglip_vq")
    assert (v.heads, v.layers, v.mlp, v.patch, v.pos_grid, v.codebook_size, v.code_width, v.conv_blocks) == (16, 2, 40, 4, 5, 13, 10, 2)
    assert v.param_dtype == jnp.float32 and v.dtype == jnp.bfloat16  # stored in single precision, run as vision_config.dtype says
    m = model.config("mmdit")
    assert (m.axes_dims, m.n_double, m.n_single, m.semantic_dim, m.guidance_embed, m.mlp_ratio) == ((2, 4, 6), 2, 3, 96, True, 4)
    assert model.config("clip").eos_id == 30  # "2" in OpenAI's configs means the largest id
    d = model.decode_config
    assert (d.steps, d.guidance, d.base_shift, d.max_shift, d.pooled_length, d.text_length) == (7, 1.5, 0.25, 1.25, 11, 512)
    assert (model.preprocess_config.patch_size, model.preprocess_config.long_size) == (4, 1152)
    assert (converted[0] / "tokenizer_t5" / "tokenizer_config.json").read_text() == json.dumps({"which": "tokenizer_2"}, indent=1)
    assert (converted[0] / "tokenizer_clip").is_dir() and (converted[0] / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_is_asked_for(dtype, released, converted, tmp_path):
    convert(*released, tmp_path / "out", dtype, "tokenizer", say=list)
    arrays, kept = arrays_of(tmp_path / "out", "siglip_vq"), arrays_of(converted[0], "siglip_vq")
    same(arrays, {k: v.astype(np.dtype(dtype)) for k, v in kept.items()})
    c = xomni_jax.load(tmp_path / "out").config("siglip_vq")
    assert c.param_dtype == c.dtype == np.dtype(dtype)


# ---- the plan and the report ----
def test_the_plan_is_a_table(released):
    lines = list(plan_lines(make_plan(open_release(*released))))
    assert "  model.layers.4.self_attn.q_proj.weight  bfloat16 [24, 20]  [O,I] -> [I,6,4]  heads/attn/q_proj/kernel[0]" in lines
    assert "  attn_pool.latent  dropped: the pooling head of contrastive training" in lines
    assert "  norm.weight  dropped: a final norm the tokenizer does not apply: the last block's output is the feature" in lines
    assert len([line for line in lines if line.startswith("transformer: 34,520 parameters in 42 arrays")]) == 1


def test_the_report_says_what_became_of_every_tensor(released, converted):
    report = json.loads((converted[0] / "conversion.json").read_text())
    weights = [
        p for folder in released for p in folder.rglob("*") if p.suffix in (".safetensors", ".pth") and p.parent.name != "transformer"
    ]
    assert set(report["files"]) == set(map(str, weights)) and len(weights) > 10
    for file, digest in report["files"].items():
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == digest
    taken = report["components"]["transformer"]["taken"]
    row = next(r for r in taken if r["key"] == "model.layers.2.mlp.down_proj.weight")
    assert (row["dtype"], row["shape"], row["target"], row["layer"]) == ("bfloat16", [20, 28], "language/mlp/down_proj/kernel", 1)
    assert row["transform"] == "[O,I] -> [I,O]" and row["file"] in report["files"] and row["stored_dtype"] == "bfloat16"
    assert {r["key"] for r in taken} == set(dirs.ar(dirs.SMALL["ar"]))
    dropped = {r["key"] for r in report["components"]["siglip_vq"]["dropped"]}
    assert dropped == {k for k in dirs.vit(dirs.SMALL["vit"]) if k.startswith(("norm.", "attn_pool", "head"))}


# ---- where a new training starts ----
def test_a_plain_qwen_becomes_an_xomni(tmp_path):
    convert(dirs.write_qwen(tmp_path / "qwen"), None, tmp_path / "out", parts=START, say=list)
    source, made = open_sharded(tmp_path / "qwen"), arrays_of(tmp_path / "out", "transformer")
    for i in range(3):
        np.testing.assert_array_equal(made["language/mlp/up_proj/kernel"][i], source.read(f"model.layers.{i}.mlp.up_proj.weight").T)
    np.testing.assert_array_equal(made["lm_embed/table"], source.read("model.embed_tokens.weight"))
    np.testing.assert_array_equal(made["lm_head/kernel"], source.read("lm_head.weight").T)
    assert made["adapters/attn/q_proj/kernel"].shape == (2, 20, 6, 4) and made["heads/mlp/down_proj/kernel"].shape == (1, 28, 20)
    std = made["adapters/mlp/gate_proj/kernel"].astype(np.float32).std()
    assert abs(std - 0.02) < 0.003 and abs(made["adapters/mlp/down_proj/kernel"].astype(np.float32).std() - 0.02 / 12**0.5) < 1e-3
    assert not made["heads/attn/k_proj/bias"].any() and (made["mm_norm/scale"] == 1).all()
    assert not np.array_equal(made["adapters/attn/o_proj/kernel"][0], made["adapters/attn/o_proj/kernel"][1])
    assert {v.dtype for v in made.values()} == {np.dtype(ml_dtypes.bfloat16)}
    new = json.loads((tmp_path / "out" / "conversion.json").read_text())["components"]["transformer"]["new"]
    assert {
        "target": "mm_embed/table",
        "shape": [22, 20],
        "how": "normal, standard deviation 0.02",
        "seed": 0,
        "stored_dtype": "bfloat16",
    } in new
    tokenizer = xomni_jax.load(tmp_path / "out").tokenizer
    assert tokenizer.image_ids(np.full((1, 2), 12))[-3:].tolist() == [396, 396, tokenizer.eom] and tokenizer.som == 384 + 13


def test_tied_embeddings_are_untied(tmp_path):
    convert(dirs.write_qwen(tmp_path / "qwen", tied=True), None, tmp_path / "out", parts=START, say=list)
    made = arrays_of(tmp_path / "out", "transformer")
    np.testing.assert_array_equal(made["lm_head/kernel"], made["lm_embed/table"].T)


def test_what_is_new_depends_on_the_seed_alone(tmp_path):
    dirs.write_qwen(tmp_path / "qwen")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(tmp_path / "qwen", None, tmp_path / name, parts=NewParts(13, 22, 2, 1, seed=seed), say=list)
    a, b, c = (arrays_of(tmp_path / name, "transformer") for name in "abc")
    same(a, b)
    assert not np.array_equal(a["mm_embed/table"], c["mm_embed/table"]) and np.array_equal(a["lm_embed/table"], c["lm_embed/table"])


def test_a_plain_siglip_becomes_a_tokenizer(tmp_path):
    convert(dirs.write_siglip(tmp_path / "siglip"), None, tmp_path / "out", parts=START, say=list)
    source, made = open_sharded(tmp_path / "siglip"), arrays_of(tmp_path / "out", "siglip_vq")
    for i in range(2):
        for part, name in enumerate("qkv"):
            key = f"vision_model.encoder.layers.{i}.self_attn.{name}_proj."
            np.testing.assert_array_equal(made["vit/blocks/qkv/kernel"][i, :, part].reshape(96, 96), source.read(key + "weight").T)
            np.testing.assert_array_equal(made["vit/blocks/qkv/bias"][i, part].ravel(), source.read(key + "bias"))
    np.testing.assert_array_equal(made["vit/pos_embed"].reshape(25, 96), source.read("vision_model.embeddings.position_embedding.weight"))
    np.testing.assert_allclose(np.linalg.norm(made["codebook"], axis=-1), 1, rtol=1e-6)
    assert made["codebook"].shape == (13, 10) and xomni_jax.load(tmp_path / "out").config("siglip_vq").heads == 3
    codes = xomni_jax.load(tmp_path / "out").encode_pixels(np.zeros((1, 8, 12, 3), np.float32))
    assert codes.shape == (1, 2, 3)


def test_three_plain_models_become_one(tmp_path, released):
    """Each conversion adds what the directory has not; the decoder's semantic input has the tokenizer's width, and starts at zero."""
    convert(dirs.write_qwen(tmp_path / "qwen"), None, tmp_path / "out", parts=START, say=list)
    convert(dirs.write_siglip(tmp_path / "siglip"), None, tmp_path / "out", parts=START, say=list)
    before = (tmp_path / "out" / "model.json").read_text()
    with pytest.raises(ConversionError, match="siglip_vq: is in the target already; choose another --to, or other parts with --only"):
        convert(tmp_path / "siglip", None, tmp_path / "out", parts=START, say=list)
    assert (tmp_path / "out" / "model.json").read_text() == before and not (tmp_path / "out.part").exists()
    convert(None, released[1], tmp_path / "out", say=list)
    made = arrays_of(tmp_path / "out", "mmdit")
    assert made["siglip_embed/kernel"].shape == (96, 24) and not made["siglip_embed/kernel"].any()
    data = read_model_json(tmp_path / "out")
    assert set(data["components"]) == set(TABLES) and data["settings"]["preprocess"] == {"patch_size": 4}
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert set(report["components"]) == set(TABLES) and len(report["files"]) == 2 + len(list(released[1].rglob("*.safetensors")))
    assert not (tmp_path / "out.part").exists()


def test_parts_that_do_not_belong_together(tmp_path, released):
    convert(dirs.write_qwen(tmp_path / "qwen"), None, tmp_path / "out", parts=NewParts(12, 22), say=list)
    with pytest.raises(ConversionError, match="transformer.image_vocab_size=12, but siglip_vq.codebook_size=13; take both from"):
        convert(released[0], None, tmp_path / "out", only="tokenizer", say=list)


# ---- whole or not at all ----
class Stop(Exception):
    pass


def test_an_interrupted_conversion_goes_on(released, converted, tmp_path, monkeypatch):
    real, written = module.save_params, []

    def save(directory, params, progress):
        if Path(directory).name == "mmdit" and not written.count("mmdit"):
            written.append("mmdit")
            (Path(directory).parent / "mmdit.orbax-checkpoint-tmp").mkdir()
            raise Stop
        written.append(Path(directory).name)
        return real(directory, params, progress)

    monkeypatch.setattr(module, "save_params", save)
    with pytest.raises(Stop):
        convert(*released, tmp_path / "out", say=list)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.part" / "siglip_vq").is_dir()
    with pytest.raises(ValueError, match="no such directory"):
        xomni_jax.load(tmp_path / "out")
    with pytest.raises(ValueError, match="no model.json here"):
        xomni_jax.load(tmp_path / "out.part")
    lines = []
    convert(*released, tmp_path / "out", say=lines.append)
    assert written == ["transformer", "siglip_vq", "mmdit", "mmdit", "autoencoder", "t5", "clip"]
    assert sum("already in" in line for line in lines) == 2 and not (tmp_path / "out.part").exists()
    for name in TABLES:
        same(arrays_of(tmp_path / "out", name), arrays_of(converted[0], name))
    assert (tmp_path / "out" / "conversion.json").read_text() == (converted[0] / "conversion.json").read_text()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(converted[0]))


def test_an_interrupted_conversion_of_something_else_is_started_again(copies, tmp_path, monkeypatch):
    real, written = module.save_params, []

    def save(directory, params, progress):
        written.append(Path(directory).name)
        if len(written) == 2:
            raise Stop
        return real(directory, params, progress)

    monkeypatch.setattr(module, "save_params", save)
    with pytest.raises(Stop):
        convert(*copies, tmp_path / "out", say=list)
    write_safetensors(copies[1] / "text_encoder", dirs.drawn(dirs.clip(dirs.SMALL["clip"]), seed=99))
    convert(*copies, tmp_path / "out", say=list)
    assert written[2] == "transformer"


def test_a_killed_process_leaves_no_model(released, tmp_path):
    program = f"""
import os, signal
from xomni_jax.checkpoint import convert, stream
write = stream._Writer._write
def killed(self, param, array, pending):
    if "codebook" in param.path:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, param, array, pending)
stream._Writer._write = killed
convert.convert({str(released[0])!r}, None, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == -9 and not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part" / "siglip_vq").exists()  # only under a name that says it is not done
    lines = []
    convert(released[0], None, tmp_path / "out", say=lines.append)
    assert f"transformer: already in {tmp_path / 'out.part'}" in lines
    assert set(read_model_json(tmp_path / "out")["components"]) == {"transformer", "siglip_vq", "mmdit"}


def test_a_full_disk_is_said_before_the_start(released, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
    with pytest.raises(ConversionError, match="3.46 MB are to be written, 1 MB are free; free some space or choose another disk"):
        convert(*released, tmp_path / "out", say=list)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_something_else_is_left_alone(released, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="is there and no model directory; choose another --to"):
        convert(*released, tmp_path, say=list)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    convert(None, released[1], tmp_path / "empty", only="text", say=list)
    assert set(read_model_json(tmp_path / "empty")["components"]) == {"t5", "clip"}
