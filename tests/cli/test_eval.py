"""xomni eval: parsing and messages; the measuring has its own tests."""

import argparse

import pytest

from xomni_jax.cli import eval as command
from xomni_jax.cli.main import main


def parse(*arguments):
    """Arguments of `xomni eval`."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_arguments(tmp_path):
    (tmp_path / "first").write_text("41.5\n")
    args = parse(
        *"effect --sft a --rl r/model --ocr http://o --out x --size 32x128 --lengths 12-16 --temperatures 1,0".split(),
        "--first-image", str(tmp_path / "first"),
    )  # fmt: skip
    assert args.size == (32, 128) and args.lengths == (12, 16) and args.temperatures == (1.0, 0.0) and args.first_image == 41.5
    assert args.prompts == 64 and args.samples == 16 and args.second is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--size=32", "write it like 32x64"),
        ("--lengths=a-b", "write it like 3-6"),
        ("--temperatures=x", "like 1,0.5,0"),
        ("--first-image=x", "neither a number"),
    ],
)
def test_wrong_values_say_how(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("effect", "--sft=a", "--rl=b", "--ocr=c", "--out=d", wrong)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_silent_service_is_one_sentence(tmp_path, capsys):
    assert main(["eval", "effect", "--sft=a", "--rl=b/model", "--ocr=http://127.0.0.1:9", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err.strip()
    assert (
        said.startswith("xomni eval: no reward service answers at http://127.0.0.1:9")
        and "xomni serve-reward ocr --port 9" in said
    )
    assert "\n" not in said and not list(tmp_path.iterdir())


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "effect", "--help"])
    said = capsys.readouterr().out
    assert "oracle" in said and said.rstrip().endswith("--out runs/demo")
