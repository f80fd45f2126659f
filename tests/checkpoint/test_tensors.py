"""Files are told by their content, folders of shards must agree with their index, and what is something else is called by its name."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.checkpoint.pickles import archive, program, tensor
from tests.checkpoint.writing import write_safetensors, write_torch_file
from tests.miniature import ROOT
from xomni_jax.checkpoint.safetensors_file import SafetensorsFile
from xomni_jax.checkpoint.tensors import LISTED, TensorFileError, TensorInfo, open_sharded, open_tensor_file
from xomni_jax.checkpoint.torch_file import TorchFile

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.int8)


# ---- one file ----
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ""])
def test_the_content_decides_not_the_name(tmp_path, suffix):
    write_torch_file(tmp_path / f"t{suffix}", {"a": A})
    (path,) = write_safetensors(tmp_path, {"a": A})
    path.rename(tmp_path / f"s{suffix}")
    for kind, letter in ((TorchFile, "t"), (SafetensorsFile, "s")):
        file = open_tensor_file(tmp_path / f"{letter}{suffix}")
        assert type(file) is kind and file.infos == {"a": TensorInfo(tmp_path / f"{letter}{suffix}", "a", np.dtype(np.float32), (2, 3))}
        np.testing.assert_array_equal(file.read("a"), A)


@pytest.mark.parametrize("length", [0x80, 0x3C, 0x4B50, 0x4750])
def test_header_lengths_that_look_like_other_files(tmp_path, length):
    """A safetensors file starts with a number, which may spell "PK", "<" or pickle's first byte."""
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert type(open_tensor_file(tmp_path / "x")) is SafetensorsFile


FILES = {
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "is a GGUF file .quantised for llama.cpp.; download the safetensors it was made from"),
    "old torch": (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + bytes(40),
        r"is a pickle outside a zip archive \(PyTorch before 1.6\); load it with",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file; convert it"),
    "npy": (b"\x93NUMPY\1\0v\0{'descr'", "is a numpy .npy file; convert it"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "is a Git LFS pointer, not the weights; run `git lfs pull`"),
    "HTML": (b"<!DOCTYPE html><html>", "is a web page, not the weights; download it again, signed in"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "is compressed with gzip; unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(40), "is compressed with zstd; unpack it first"),
    "text": (b"hello, this is no file of tensors", "is neither safetensors nor a zip file of torch.save; give one of these"),
    "empty": (b"", "is empty; download it again"),
    "cut zip": (
        archive(program({"w": tensor((1,), (1,))}))[:200],
        r"cannot be read \(File is not a zip file\); the file is damaged or cut off",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_other_files_are_refused_by_name(tmp_path, what):
    data, words = FILES[what]
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(TensorFileError, match=words) as error:
        open_tensor_file(tmp_path / "weights.pth")
    assert str(error.value).startswith(f"{tmp_path / 'weights.pth'}: ") and "\n" not in str(error.value)


def test_no_file_no_rights_a_folder_and_a_bad_safetensors(tmp_path):
    for name, words in (("none.pth", "none.pth: no such file; check the path"), ("", "is a folder, a file is wanted")):
        with pytest.raises(TensorFileError, match=words):
            open_tensor_file(tmp_path / name)
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(TensorFileError, match="a.safetensors: does not start like a safetensors file; download it again"):
        open_tensor_file(tmp_path / "a.safetensors")
    with pytest.raises(TensorFileError, match="cannot be opened .*; give a file that can be read"):
        open_tensor_file(tmp_path / "a.safetensors" / "b")


@pytest.mark.parametrize(
    "keys",
    [
        [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        ],
        ["transformer.single_transformer_blocks.0.attn.to_k.lora_down.weight", "transformer.single_transformer_blocks.0.attn.to_k.alpha"],
        ["unet.up.lora.up.weight", "unet.up.lora.down.weight"],
    ],
)
def test_lora_matrices_alone_are_refused_and_beside_weights_are_not(tmp_path, keys):
    for write in (lambda t: write_safetensors(tmp_path, t), lambda t: write_torch_file(tmp_path / "model.safetensors", t)):
        write({k: A for k in sorted(keys)})
        with pytest.raises(
            TensorFileError, match=f"holds only LoRA matrices, such as '{min(keys)}'; merge them into their base model first"
        ):
            open_tensor_file(tmp_path / "model.safetensors")
        write({k: A for k in [*keys, "norm.weight"]})
        assert len(open_tensor_file(tmp_path / "model.safetensors").infos) == len(keys) + 1


# ---- folders ----
def folder_of_two(tmp_path):
    write_safetensors(tmp_path, {"a": A, "b": B}, shard_bytes=A.nbytes)
    return (
        tmp_path / "model-00001-of-00002.safetensors",
        tmp_path / "model-00002-of-00002.safetensors",
        tmp_path / "model.safetensors.index.json",
    )


def test_shards_are_one_file(tmp_path):
    first, second, _ = folder_of_two(tmp_path)
    folder = open_sharded(tmp_path)
    assert {k: i.file for k, i in folder.infos.items()} == {"a": first, "b": second} and folder.describe_missing("c") == f"{tmp_path}: c"
    np.testing.assert_array_equal(folder.read("a"), A)
    folder.release("b")
    np.testing.assert_array_equal(folder.read("b"), B)
    for action in (folder.read, folder.release):
        with pytest.raises(KeyError, match="c"):
            action("c")


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_one_file_is_a_folder_of_shards_too(tmp_path, stem):
    write_safetensors(tmp_path, {"a": A}, name=stem)
    assert open_sharded(tmp_path).infos["a"].file == tmp_path / f"{stem}.safetensors"


def test_shards_behind_links_as_in_the_hub_s_cache(tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in folder_of_two(tmp_path / "blobs"):
        os.symlink(path, tmp_path / "snapshot" / path.name)
    assert set(open_sharded(tmp_path / "snapshot").infos) == {"a", "b"}


def test_a_variant_s_index_beside_the_usual_one(tmp_path):
    *_, index = folder_of_two(tmp_path)
    shutil.copy(index, tmp_path / "other.fp16.safetensors.index.json")
    assert set(open_sharded(tmp_path).infos) == {"a", "b"}
    index.rename(tmp_path / "x.safetensors.index.json")
    with pytest.raises(
        TensorFileError, match=r"has 2 indexes \(other.fp16.safetensors.index.json, x.safetensors.index.json\); leave the one"
    ):
        open_sharded(tmp_path)


def edit(index, change):
    data = json.loads(index.read_text())
    change(data["weight_map"])
    index.write_text(json.dumps(data))


def test_every_problem_of_a_folder_is_listed_at_once(tmp_path):
    first, second, index = folder_of_two(tmp_path)
    write_safetensors(tmp_path / "x", {"a": A, "c": A, "d": B, "e": B})
    shutil.copy(tmp_path / "x" / "model.safetensors", tmp_path / "three.safetensors")
    second.write_bytes(second.read_bytes()[:-1])
    edit(index, lambda m: m.update({"f": first.name, "c": "three.safetensors", "d": first.name, "z": "gone.safetensors"}))
    with pytest.raises(TensorFileError) as error:
        open_sharded(tmp_path)
    head, *problems = str(error.value).split("\n  ")
    assert head == f"{index}: 6 problems; download the folder again:"
    assert problems[0].startswith(f"{second}: its header cannot be read (incomplete metadata")
    assert problems[1].startswith(f"{tmp_path / 'gone.safetensors'}: no such file; check the path")
    assert problems[2:] == [
        f"'f' is not in {first.name}, where the index places it",
        f"'d' is not in {first.name}, where the index places it, but in three.safetensors",
        f"'a' is in three.safetensors as well as in {first.name}, where the index places it",
        "'e' is in three.safetensors, the index does not list it",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    first, _, index = folder_of_two(tmp_path)
    edit(index, lambda m: m.update({f"k{i}": first.name for i in range(100)}))
    with pytest.raises(TensorFileError, match=f"100 problems; .*(\n.*){{{LISTED}}}\n  and {100 - LISTED} more$"):
        open_sharded(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "index.json: not readable as JSON"),
        ("[" * 5000, "index.json: not readable as JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "a comes twice"),
        ("[]", "is no JSON object"),
        ("{}", "has no weight_map from keys to files"),
        ('{"weight_map": {}}', "has no weight_map from keys to files"),
        ('{"weight_map": {"a": 1}}', "has no weight_map from keys to files"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "places 'a' in '../model.safetensors', which is no file of this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "places 'a' in '/etc/passwd', which is no file of this folder"),
        ('{"weight_map": {"a": ".."}}', "places 'a' in '..', which is no file of this folder|is a folder, a file is wanted"),
        ('{"weight_map": {"a": ""}}', "places 'a' in '', which is no file of this folder"),
        ('{"weight_map": {"a": "x\\u0000y"}}', r"places 'a' in 'x\\x00y', which is no file of this folder"),
    ],
)
def test_indexes_that_are_none(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TensorFileError, match=words):
        open_sharded(tmp_path)


FOLDERS = {
    "empty": ([], "holds no model.safetensors or diffusion_pytorch_model.safetensors and no index of shards; give the model's folder"),
    "LoRA": (
        ["README.md", "adapter_model.safetensors"],
        r"holds a LoRA \('adapter_model.safetensors'\), not model.safetensors .*; merge it",
    ),
    "diffusers LoRA": (["pytorch_lora_weights.safetensors"], r"holds a LoRA \('pytorch_lora_weights.safetensors'\)"),
    "pipeline": (
        ["model_index.json", "vae"],
        r"holds a whole diffusers pipeline \('model_index.json'\).*; give one of its folders, such as transformer",
    ),
    "no index": (
        ["model-00001-of-00002.safetensors"],
        "holds shards without an index: copying or writing was interrupted .*; fetch or write it again",
    ),
    "parts": (["model-00001-of-00002.safetensors.part"], "holds shards without an index"),
    "GGUF": (["q4.gguf"], r"holds GGUF files \('q4.gguf'\)"),
    "pickles": (["pytorch_model.bin"], r"holds PyTorch pickles \('pytorch_model.bin'\).*; give the file itself"),
    "other name": (
        ["flux1-dev.safetensors"],
        r"holds a safetensors file of another name \('flux1-dev.safetensors'\).*; give the file itself",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_other_folders_are_refused_by_name(tmp_path, what):
    names, words = FOLDERS[what]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(TensorFileError, match=words) as error:
        open_sharded(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(TensorFileError, match="gone: no such folder; give a folder with model.safetensors or its index"):
        open_sharded(tmp_path / "gone")


def test_torch_is_not_loaded(tmp_path):
    """In a fresh interpreter, reading and writing both kinds imports no torch."""
    write_torch_file(tmp_path / "a.pth", {"a": A})
    code = f"""
import sys
from tests.checkpoint.writing import write_safetensors
from xomni_jax.checkpoint.tensors import open_tensor_file
file = open_tensor_file({str(tmp_path / "a.pth")!r})
write_safetensors({str(tmp_path)!r}, {{k: file.read(k) for k in file.infos}})
assert open_tensor_file({str(tmp_path / "model.safetensors")!r}).read("a").sum() == 15
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "False\n", done.stdout + done.stderr
