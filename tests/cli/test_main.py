"""The command line: help that works, and one sentence with exit code 2 for whatever a user can fix."""

import importlib
import shutil
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from xomni_jax.cli import main as cli
from xomni_jax.cli.main import COMMANDS, main

BUILT = [name for name in COMMANDS if importlib.util.find_spec("xomni_jax.cli." + name.replace("-", "_"))]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What main changes for the process is undone; a debugging switch of the developer's shell is ignored."""
    monkeypatch.setattr(sys, "argv", ["xomni"])
    monkeypatch.delenv("XOMNI_DEBUG", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")


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


def test_the_overview_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["inspect", "a", "--colour", "red"], ["generate", "a", "--seed", "x"]])
def test_a_wrong_command_line_is_two(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "raised, code, told",
    [
        (ValueError("steps=0 must be at least 1"), 2, "xomni chat: steps=0 must be at least 1\n"),
        (KeyError("no such axis"), 2, "xomni chat: no such axis\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "xomni chat: [Errno 2] No such file or directory: 'x.png'\n"),
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
    assert "--max-tokens 0 must be at least 1" in refusal(capsys, "chat", image, "what?", *model, "--max-tokens", "0")
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
