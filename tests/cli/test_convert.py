"""`xomni convert`, `export` and `inspect` as commands: what they print, and what they refuse."""

import sys

import pytest

from tests.checkpoint import released_dirs as dirs
from tests.checkpoint.test_released import rewrite
from xomni_jax.cli.main import main


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What main changes for the process is undone."""
    monkeypatch.setattr(sys, "argv", ["xomni"])
    monkeypatch.delenv("XOMNI_DEBUG", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")


@pytest.fixture(scope="module")
def xomni(tmp_path_factory):
    return dirs.write_xomni(tmp_path_factory.mktemp("cli") / "xomni")


def said(capsys, code, *arguments):
    assert main(list(map(str, arguments))) == code
    return capsys.readouterr()


def test_there_and_back(xomni, tmp_path, capsys):
    told = said(capsys, 0, "convert", "--xomni", xomni, "--to", tmp_path / "model")
    assert told.out.splitlines()[-1] == f"written: {tmp_path / 'model'}" and told.err == ""
    told = said(capsys, 0, "inspect", tmp_path / "model")
    assert told.out.splitlines()[-1] == "missing: autoencoder, t5, clip"
    told = said(capsys, 0, "export", "--from", tmp_path / "model", "--to", tmp_path / "back", "--shard-gb", "0.00002")
    assert told.out.splitlines()[-1] == f"written: {tmp_path / 'back'}"
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert said(capsys, 0, "inspect", xomni, "--diff", tmp_path / "back").out == "all 145 parameters are equal\n"


def test_a_difference_is_one_line_and_exit_code_one(xomni, tmp_path, capsys):
    import shutil

    other = shutil.copytree(xomni, tmp_path / "x")
    rewrite(other, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 0})
    lines = said(capsys, 1, "inspect", xomni, "--diff", other).out.splitlines()
    assert lines[0].startswith("transformer/lm_head/kernel: max abs ") and ", relative 1.000e+00, 7,680 values differ" in lines[0]
    assert lines[1:] == ["1 of 145 parameters differ"]


def test_a_missing_component_counts_with_all_its_parameters(xomni, tmp_path, capsys):
    said(capsys, 0, "convert", "--xomni", xomni, "--to", tmp_path / "model", "--only", "tokenizer")
    lines = said(capsys, 1, "inspect", tmp_path / "model", "--diff", xomni).out.splitlines()
    assert lines == [f"transformer: only in {xomni}", f"mmdit: only in {xomni}", "109 of 145 parameters differ"]


def test_the_plan_is_printed_and_nothing_written(xomni, tmp_path, capsys):
    told = said(capsys, 0, "convert", "--xomni", xomni, "--to", tmp_path / "model", "--only", "tokenizer", "--plan").out.splitlines()
    assert told[0].startswith("siglip_vq: 433,084 parameters in 36 arrays") and told[-1] == "nothing written; 1.73 MB would be"
    assert "  head.weight  dropped: a classifier head" in told
    assert not list(tmp_path.iterdir())


def test_several_problems_are_several_lines(xomni, tmp_path, capsys):
    import shutil

    other = shutil.copytree(xomni, tmp_path / "x")
    rewrite(other, lambda t: {k: v for k, v in t.items() if "norm" not in k})
    told = said(capsys, 2, "convert", "--xomni", other, "--to", tmp_path / "model").err.splitlines()
    assert told[0] == "xomni convert: 14 problems:" and len(told) == 15
    assert f"  {other}: model.lm_norm.weight: missing from the checkpoint" in told and not (tmp_path / "model").exists()


def test_a_nan_is_a_warning(xomni, tmp_path, capsys):
    import shutil

    other = shutil.copytree(xomni, tmp_path / "x")
    rewrite(other, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * float("nan")})
    told = said(capsys, 0, "convert", "--xomni", other, "--to", tmp_path / "model", "--only", "transformer")
    assert told.err == f"warning: {other}/model.safetensors: lm_head.weight: holds values that are NaN\n"


@pytest.mark.parametrize(
    "line, words",
    [
        ("convert", "neither --xomni nor --flux is given; say what to convert"),
        ("convert --xomni X", "--to is missing; say where the model directory goes"),
        ("convert --xomni X --to=", "--to is missing; say where the model directory goes"),
        ("export --from X --to=", "--to is empty; say where the export goes"),
        ("convert --xomni /nowhere --to {}/a", "/nowhere: no such directory; give the directory of a downloaded checkpoint"),
        ("convert --xomni X --to {}/a --only vae", "--only vae: the given directories hold no autoencoder; give --flux"),
        ("convert --xomni X --to {}/a --image-vocab 0", "image_vocab_size=0 is too small"),
        ("convert --xomni X --to X", "is there and no model directory; choose another --to"),
        ("convert --flux xomni_jax/assets/tiny_sft --to {}/a", "tiny_sft: is already a model directory of this package; use it as it is"),
        ("export --from X --to {}/a", "no model.json here"),
        ("export --from xomni_jax/assets/tiny_sft --to {}/a --shard-gb 0", "--shard-gb 0 must be above 0"),
        ("export --from xomni_jax/assets/tiny_sft --to X", "is there already; choose another --to"),
        ("inspect /nowhere", "/nowhere: no such directory"),
        ("inspect tests", "tests: holds no config.json"),
    ],
)
def test_errors_are_one_sentence(line, words, xomni, tmp_path, capsys):
    told = said(capsys, 2, *(word.replace("X", str(xomni)) if word == "X" else word.format(tmp_path) for word in line.split())).err
    assert words in told and told.count("\n") == 1 and told.startswith(f"xomni {line.split()[0]}: ") and not list(tmp_path.iterdir())
