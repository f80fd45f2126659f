"""The documents' commands and the examples of every --help parse, their configuration keys exist, and so do the README's files."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from xomni_jax.cli import main as cli
from xomni_jax.core.config import ConfigError
from xomni_jax.training.stage import load_config

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "launch/README.md", "configs/README.md", "xomni_jax/serving/README.md")
DOCUMENTS = [*(ROOT / name for name in READMES), *sorted(ROOT.glob("configs/*/README.md"))]
TEXT = DOCUMENTS[0].read_text()


def commands(text):
    """What a reader may type: a line, or between backticks; also behind -- and &&. Without those that stand for any command."""
    found = re.findall(r"(?:^ *|`|-- +|&& )(xomni [a-z-]+ [^`\n|&]*)", text.replace("\\\n", " "), flags=re.M)
    return sorted({line.strip() for line in found if not re.search(r"\.\.\.|=FILE|SUITE\b", line)})


def parse(line, monkeypatch):
    """As `xomni` would; overrides must name keys that exist."""
    words = shlex.split(line, comments=True)[1:]
    monkeypatch.setattr("sys.argv", ["xomni", *words])
    parser = cli.build_parser()
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parser.parse_known_args(words)
        return
    args, rest = parser.parse_known_args(words)
    assert all(word.startswith("--config.") for word in rest)
    if args.command in ("train", "plan") and args.config:
        try:
            load_config(ROOT / args.config, [word.removeprefix("--config.") for word in rest])
        except ConfigError as error:  # their sizes stand in a file that is not here
            assert "--config.data.source=codes" in rest and "my_codes holds no index.json" in str(error)


@pytest.mark.parametrize("line", sorted({line for document in DOCUMENTS for line in commands(document.read_text())}))
def test_command_parses(line, monkeypatch):
    parse(line, monkeypatch)


def kinds_of_eval(monkeypatch):
    """The subcommands of xomni eval."""
    monkeypatch.setattr("sys.argv", ["xomni", "eval"])
    (eval_parser,) = [action.choices["eval"] for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    (kinds,) = [action.choices for action in eval_parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(kinds)


def test_every_help_ends_with_an_example_and_all_its_examples_parse(capsys, monkeypatch):
    kinds = kinds_of_eval(monkeypatch)
    assert len(kinds) >= 19  # the suites, all, the studies and effect
    for words in [[name] for name in cli.COMMANDS] + [["eval", kind] for kind in kinds]:
        monkeypatch.setattr("sys.argv", ["xomni", *words, "--help"])
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args([*words, "--help"])
        said = capsys.readouterr().out.split("\n\n", 1)[1]  # without the usage
        last = said.replace("\\\n", " ").rstrip().splitlines()[-1]
        assert commands(last) and " ".join(["xomni", *words]) in said, words
        for line in commands(said):
            parse(line, monkeypatch)


def test_files_and_links_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
    for path in re.findall(r"bash (launch/\S+\.sh)", TEXT):
        assert (ROOT / path).is_file(), path


def test_what_the_commands_write_is_ignored_by_git():
    written = {"images"}  # where xomni generate writes unless it is told
    for line in commands(TEXT):
        written |= set(re.findall(r"--(?:out|to|json|html|config\.run_dir)[ =](\S+)", line))
    written = {path for path in written if not path.startswith("/")}
    told = subprocess.run(["git", "check-ignore", *(f"{path}/file" for path in written)], cwd=ROOT, capture_output=True, text=True)
    if told.returncode == 128:
        pytest.skip("not a git checkout")
    assert {line.removesuffix("/file") for line in told.stdout.splitlines()} == written and len(written) > 5
