"""Checkpoints as downloads, copies and other programs leave them: read where torch and transformers read them, or refused in a sentence."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.pickles import W, archive, call, program
from tests.checkpoint.pickles import refused as refused_file
from tests.checkpoint.test_convert import START, arrays_of, same
from tests.checkpoint.test_released import refused, rewrite, tensors
from tests.checkpoint.writing import write_torch_file
from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.released import open_release
from xomni_jax.checkpoint.tensors import open_sharded, open_tensor_file
from xomni_jax.checkpoint.torch_file import TorchFile


# ---- two versions in one folder ----
@pytest.mark.parametrize(
    "stem, extra", [("model", "model"), ("model", "diffusion_pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")]
)
def test_shards_beside_a_single_file_are_refused(stem, extra, released, tmp_path):
    folder = shutil.copytree(released[0] if stem == "model" else released[0] / "mmdit", tmp_path / "x")
    save_file({"w": np.ones(2, np.float32)}, folder / f"{extra}.safetensors")
    with pytest.raises(
        ConversionError, match=f"x: holds {stem}.safetensors.index.json with its shards and {extra}.safetensors as well; remove"
    ):
        open_sharded(folder)


def test_two_single_files_are_refused_and_an_index_of_one_file_is_not(released, tmp_path):
    rewrite(folder := shutil.copytree(released[0], tmp_path / "x"), lambda t: t)
    index = {"weight_map": dict.fromkeys(tensors(folder), "model.safetensors")}
    dirs.write_json(folder / "model.safetensors.index.json", index)
    same(tensors(folder), tensors(released[0]))
    (folder / "model.safetensors.index.json").unlink()
    shutil.copyfile(folder / "model.safetensors", folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConversionError, match="x: holds model.safetensors and diffusion_pytorch_model.safetensors; remove"):
        open_sharded(folder)


# ---- JSON ----
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_any_encoding(encoding, copies, converted, tmp_path):
    for file in (copies[0] / "config.json", copies[0] / "model.safetensors.index.json", copies[1] / "vae" / "config.json"):
        file.write_text(file.read_text(), encoding=encoding)
    release = open_release(*copies)
    assert release.released["xomni"] == dirs.xomni_config(dirs.SMALL) and set(release.components) == {
        "transformer", "siglip_vq", "mmdit", "autoencoder", "t5", "clip",
    }  # fmt: skip


# ---- safetensors as other programs write them ----
@pytest.mark.parametrize("row", [{"note": "x"}, {"shape_hint": [1], "extra": None}])
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, "absent"])
def test_headers_that_the_library_reads(row, metadata, tmp_path):
    table = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **row}}
    table = table if metadata == "absent" else {"__metadata__": metadata, **table}
    header = json.dumps(table).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes())
    assert open_tensor_file(tmp_path / "m.safetensors").read("w").tolist() == [1, 2]


@pytest.mark.parametrize("kept, left", [("lm_head.weight", "model.embed_tokens.weight"), ("model.embed_tokens.weight", "lm_head.weight")])
@pytest.mark.parametrize("told_by", ["metadata", "config"])
def test_tied_weights_are_stored_once(kept, left, told_by, tmp_path):
    """As safetensors.torch.save_model writes them, or by the config alone."""
    qwen = dirs.write_qwen(tmp_path / "qwen")
    dirs.edit_config(qwen, tie_word_embeddings=told_by == "config")
    found = {k: v.astype(np.float32) for k, v in tensors(qwen).items() if k != left}
    save_file(found, qwen / "model.safetensors", {"format": "pt"} | ({left: kept} if told_by == "metadata" else {}))
    convert(qwen, None, tmp_path / "out", parts=START, say=list)
    made = arrays_of(tmp_path / "out", "transformer")
    np.testing.assert_array_equal(made["lm_head/kernel"], found[kept].T)
    np.testing.assert_array_equal(made["lm_embed/table"], found[kept])


def test_what_is_said_to_be_tied_to_nothing_is_missing(tmp_path):
    qwen = dirs.write_qwen(tmp_path / "qwen")
    found = {k: v.astype(np.float32) for k, v in tensors(qwen).items() if k != "lm_head.weight"}
    save_file(found, qwen / "model.safetensors", {"format": "pt", "lm_head.weight": "model.nowhere"})
    assert refused(tmp_path, qwen, None, parts=START) == f"{qwen}: lm_head.weight: missing from the checkpoint"


# ---- links of a download cache ----
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
OTHERS = ["config.json", "model-00002-of-00004.safetensors", "model.safetensors.index.json", "vit/projector.pth", "mmdit/config.json"]


@pytest.mark.parametrize("file", TOKENIZER + OTHERS)
def test_broken_links_are_named(file, copies, tmp_path):
    (copies[0] / file).unlink(missing_ok=True)
    (copies[0] / file).symlink_to("../../blobs/0123abcd")
    told = refused(tmp_path, *copies)
    assert f"{copies[0] / file}: is a link to ../../blobs/0123abcd, which does not exist" in told and told.count(str(copies[0] / file)) == 1


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"])
def test_broken_links_of_flux_are_named(file, copies, tmp_path):
    (copies[1] / file).unlink()
    (copies[1] / file).symlink_to(tmp_path / "gone")
    assert f"{copies[1] / file}: is a link to {tmp_path}/gone, which does not exist" in refused(tmp_path, *copies)


def test_links_that_hold_are_followed(released, converted, tmp_path):
    """The layout of the cache of huggingface_hub: every file is a link into a folder of blobs, and so is the directory given."""
    for at, folder in zip(("x", "f"), released):
        for number, file in enumerate(p for p in folder.rglob("*") if p.is_file()):
            blob, link = tmp_path / "blobs" / f"{at}{number}", tmp_path / at / "snapshot" / file.relative_to(folder)
            blob.parent.mkdir(exist_ok=True), link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob), link.symlink_to(blob)
        (tmp_path / f"main_{at}").symlink_to(tmp_path / at / "snapshot", target_is_directory=True)
    convert(tmp_path / "main_x" / "", f"{tmp_path}/x/../main_f", tmp_path / "link.out", only="tokenizer", say=list)
    same(arrays_of(tmp_path / "link.out", "siglip_vq"), arrays_of(converted[0], "siglip_vq"))


@pytest.mark.parametrize("spelling", ["./out/", "a/../out", "link/out"])
def test_every_spelling_of_the_target(spelling, released, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    convert(None, released[1], spelling, only="text", say=list)
    assert set(xomni_jax.load("out").description["components"]) == {"t5", "clip"} and not (tmp_path / "out.part").exists()


# ---- what lies beside the weights of a torch file ----
PROJECTOR = dirs.drawn(dirs.projector(dirs.SMALL["vq"], 96), np.float32, 3)
EXTRAS = {
    "Counter": call("collections.Counter", {"a": 2}),
    "bytes": call("_codecs.encode", "\xff", "latin1"),
    "bytearray": call("__builtin__.bytearray", "abc", "latin-1"),
    "complex": call("builtins.complex", 1.0, -2.0),
    "layout": call("torch.serialization._get_layout", "torch.strided"),
    "set": call("__builtin__.set", [1, 2]),
    "None": None,
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_what_torch_reads_beside_tensors_is_read(kind, tmp_path):
    """The list of `torch.load(weights_only=True)`; `tests/parity` compares with torch itself."""
    extra = EXTRAS[kind]
    file = TorchFile(tmp_path / "w.pth", archive(program({"model": {"w": W}, "extra": extra, "deep": [extra, {"a": extra}]})))
    assert list(file.infos) == ["model.w"] and file.others == {"extra", "deep"}


@pytest.mark.parametrize(
    "full", ["_codecs.decode", "_codecs.lookup", "builtins.bytes", "builtins.eval", "collections.deque", "codecs.encode"]
)
def test_neighbours_of_what_is_read_are_refused(full):
    assert f"asks for {full!r}, which weights do not need" in refused_file(archive(program({"w": W, "extra": call(full, "x")})), full)


def with_projector(xomni, parts):
    """The released directory with another projector file: {"a.b": tensors} nested."""
    write_torch_file(xomni / "vit" / "projector.pth", {f"{at}.{k}" if at else k: v for at, t in parts.items() for k, v in t.items()})
    return xomni


MOMENTS = {f"state.{i}.exp_avg": v for i, v in enumerate(PROJECTOR.values())}


@pytest.mark.parametrize(
    "parts, left",
    [
        ({"model": PROJECTOR, "optimizer": MOMENTS}, "'optimizer'"),
        ({"state_dict": PROJECTOR, "optim.exp_avg": PROJECTOR, "optim.exp_avg_sq": PROJECTOR}, "'optim'"),
        (
            {"net.vq": PROJECTOR, "net.head": {"weight": np.ones(3, np.float32)}, "scaler": {"scale": np.ones(1, np.float32)}},
            "'net.head', 'scaler.scale'",
        ),
    ],
)
def test_parts_beside_the_weights_are_named_and_left(parts, left, copies, converted, tmp_path):
    lines = []
    convert(with_projector(copies[0], parts), None, tmp_path / "out", only="tokenizer", say=lines.append)
    assert f"{copies[0]}/vit/projector.pth: holds {left} beside the weights; left out" in lines
    same(arrays_of(tmp_path / "out", "siglip_vq"), arrays_of(converted[0], "siglip_vq"))


@pytest.mark.parametrize("names", [("model", "ema"), ("ema.module", "net", "student")])
def test_two_sets_of_weights_are_one_line(names, copies, tmp_path):
    told = refused(tmp_path, with_projector(copies[0], dict.fromkeys(names, PROJECTOR)), None)
    listed = " and ".join(repr(n) for n in sorted(names))
    assert told.startswith(f"{copies[0]}/vit/projector.pth: {listed} each hold quantize.embedding.weight; save the one to be read alone")
    assert "\n" not in told
