"""The command line: help that works, and one sentence with exit code 2 for whatever a user can fix."""

import importlib
import re
import shutil
import socket
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from xomni_jax.cli import main as cli
from xomni_jax.cli.main import COMMANDS, main

BUILT = [name for name in COMMANDS if importlib.util.find_spec("xomni_jax.cli." + name.replace("-", "_"))]


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """What main changes for the process is undone; a debugging switch of the developer's shell is ignored."""
    monkeypatch.setattr(sys, "argv", ["xomni"])
    monkeypatch.delenv("XOMNI_DEBUG", raising=False)
    for name, value in (("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache")), ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


def refusal(capsys, *arguments: str) -> str:
    """The sentence on stderr of a command that must fail with 2, and nothing on stdout but progress of the run."""
    assert main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith(f"xomni {arguments[0]}: ") and "Traceback" not in told
    return told


@pytest.mark.parametrize("name", BUILT)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert COMMANDS[name][1:] in told and f"xomni {name} " in told.split("options:")[1]  # the example at the end


@pytest.mark.parametrize(
    "words", [[], *([name] for name in BUILT), *(["eval", k] for k in ("geneval", "rendered-qa", "all", "effect", "guidance"))]
)
def test_help_fits_a_screen_and_help_all_explains_every_option(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([*words, option])
        told.append(capsys.readouterr().out)
    short, whole = (set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, flags=re.M)) for text in told)
    assert told[0].count("\n") <= 40 and told[0].startswith("usage: ") and short <= whole | {"--help-all"}
    assert ("--help-all also explains" in told[0]) == (short < whole)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["generate", "a", "--tempature", "1"], "xomni generate: unknown option --tempature; did you mean --temperature?"),
        (["eval", "geneval", "--out", "x", "--data", "x", "--juge=y"], "xomni eval geneval: unknown option --juge; did you mean --judge?"),
        (
            ["train", "--config=x", "--steps=3"],
            "xomni train: unknown option --steps; keys of the configuration are written --config.KEY=VALUE",
        ),
        (["inspect", "a", "--config.steps=3"], "xomni inspect: unknown option --config.steps"),
        (["inspect", "a", "b"], "xomni inspect: unexpected argument 'b'; a text with spaces needs quotation marks"),
        (["serve-reward", "ocr", "--port", "x"], "xomni serve-reward ocr: argument --port: invalid int value: 'x'"),
        (["export", "--from", "x", "--to", "y", "--dtype", "bfloat"], "argument --dtype: invalid choice: 'bfloat'; did you mean bfloat16?"),
        (["genrate", "a"], "xomni: argument SUBCOMMAND: invalid choice: 'genrate'; did you mean generate?"),
        (["chat"], "xomni chat: the following arguments are required: IMAGE, QUESTION"),
    ],
)
def test_a_mistake_is_answered_by_the_sentence_and_little_else(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    first, *more = capsys.readouterr().err.splitlines()
    assert told in first and 1 <= len(more) <= 3 and more[0].startswith("usage: ") and more[-1].endswith("--help lists the options")


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"xomni_jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "files, found",
    [
        ({}, False),
        ({"dev/accel0": ""}, True),  # v4, v5e
        ({"dev/vfio/0": ""}, True),  # v5p, v6e
        ({"dev/vfio/vfio": ""}, False),
        ({"dev/nvidia0": ""}, True),
        ({"sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n", "sys/bus/pci/devices/0000:00:05.0/device": "0x006f\n"}, True),
        ({"sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n", "sys/bus/pci/devices/0000:00:04.0/device": "0x0042\n"}, False),  # network
        ({"sys/bus/pci/devices/0000:00:03.0/vendor": "0x8086\n", "sys/bus/pci/devices/0000:00:03.0/device": "0x1237\n"}, False),
    ],
)
@pytest.mark.parametrize("chosen", [None, "tpu,cpu"])
def test_a_tpu_is_looked_for_only_where_there_may_be_one(files, found, chosen, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("JAX_PLATFORMS")
    if chosen:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    cli.set_up(tmp_path)
    assert cli.os.environ.get("JAX_PLATFORMS") == (chosen or (None if found else "cpu"))


def test_the_overview_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["chat"], ["inspect", "a", "--colour", "red"], ["generate", "a", "--seed", "x"]])
def test_a_wrong_command_line_is_two(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "raised, code, told",
    [
        (ValueError("steps=0 must be at least 1"), 2, "xomni chat: steps=0 must be at least 1\n"),
        (KeyError("no such axis"), 2, "xomni chat: no such axis\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "xomni chat: x.png: No such file or directory\n"),
        (FloatingPointError("loss is nan"), 2, "xomni chat: loss is nan\n"),
        (ValueError(""), 2, "xomni chat: ValueError\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 1, ""),
        (
            ValueError("Incompatible shapes for broadcasting: (2,) and (3,)\nThe stack trace below\n..."),
            1,
            "xomni chat: internal error, ValueError: Incompatible shapes for broadcasting: (2,) and (3,) (XOMNI_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_how_errors_end(raised, code, told, monkeypatch, capsys):
    from xomni_jax.cli import chat

    def run(args, rest):
        raise raised

    monkeypatch.setattr(chat, "run", run)
    assert main(["chat", "image.png", "what?"]) == code
    assert capsys.readouterr().err == told


def test_errors_of_the_program_are_not_hidden(monkeypatch):
    from xomni_jax.cli import chat

    def run(args, rest):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(chat, "run", run)
    with pytest.raises(TypeError):
        main(["chat", "image.png", "what?"])


def test_debugging_shows_everything(monkeypatch):
    monkeypatch.setenv("XOMNI_DEBUG", "1")
    with pytest.raises(ValueError):
        main(["chat", "/nowhere.png", "what?"])


# ---- chat ----
@pytest.fixture
def image(tmp_path):
    """A readable image."""
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_chat_answers(image, model_dir, capsys):
    assert main(["chat", image, "what is this?", "--model", str(model_dir), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_chat_refuses(image, model_dir, tmp_path, capsys):
    model = ["--model", str(model_dir)]
    told = refusal(capsys, "chat", str(tmp_path / "no" / "image.png"), "what?", *model)
    assert "image.png cannot be read: No such file or directory; give" in told
    (tmp_path / "text.png").write_text("this is no image")
    assert "text.png cannot be read: it is none of PNG, JPEG" in refusal(capsys, "chat", str(tmp_path / "text.png"), "what?", *model)
    (tmp_path / "cut.png").write_bytes(open(image, "rb").read()[:60])
    assert "cut.png cannot be read: it is damaged or cut off" in refusal(capsys, "chat", str(tmp_path / "cut.png"), "what?", *model)
    assert "the question is empty" in refusal(capsys, "chat", image, " ", *model)
    for tokens in ("0", "5000"):
        told = refusal(capsys, "chat", image, "what?", *model, "--max-tokens", tokens)
        assert f"an answer of {tokens} tokens is not possible; this model's tokenizer allows 1 to 4096" in told
    told = refusal(capsys, "chat", image, "what " * 10_000, *model)
    assert re.search(r"the question has \d{5} tokens, beside an answer of 512 this model's tokenizer allows 3584; shorten it", told)
    assert "the question is not valid UTF-8 at character 6" in refusal(capsys, "chat", image, "what \udcff?", *model)
    Image.fromarray(np.zeros((6, 32, 3), np.uint8)).save(tmp_path / "low.png")
    assert "the short side is below 8 pixels" in refusal(capsys, "chat", str(tmp_path / "low.png"), "what?", *model)
    assert "/nowhere: no such directory; give a model directory" in refusal(capsys, "chat", image, "what?", "--model", "/nowhere")


def test_a_truncated_model_is_named(image, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "model")
    largest = max((p for p in (tmp_path / "model" / "siglip_vq").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    told = refusal(capsys, "chat", image, "what?", "--model", str(tmp_path / "model"))
    assert f"{tmp_path / 'model' / 'siglip_vq'}: cannot be read, it is incomplete or damaged" in told


def test_a_model_without_its_tokenizer(image, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    assert "tokenizer" in refusal(capsys, "chat", image, "what?", "--model", str(tmp_path / "model"))


# ---- services ----
def test_a_taken_port(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"{port}" in refusal(capsys, "serve-reward", "shapes", "--port", str(port), "--workers", "1")


def test_the_cache_of_compiled_programs_can_be_chosen(monkeypatch, image, model_dir):
    """An explicit setting wins over the default."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    main(["chat", "/nowhere.png", "what?"])
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    cli.set_up()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == "/cache/xomni_jax/xla"
