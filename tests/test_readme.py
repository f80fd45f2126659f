"""The README's commands parse, its files exist, and its Python runs against names that exist."""

import re
import shlex
from pathlib import Path

import pytest

from xomni_jax.cli import main as cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
JOINED = TEXT.replace("\\\n", " ")
COMMANDS = sorted(set(re.findall(r"(?:^|`)(xomni [a-z][^`\n]*)", JOINED, flags=re.M)))


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line, monkeypatch):
    words = shlex.split(line, comments=True)[1:]
    words = [w for w in words if w != "&"]
    monkeypatch.setattr("sys.argv", ["xomni", *words])
    parser = cli.build_parser()
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parser.parse_known_args(words)
        return
    args, rest = parser.parse_known_args(words)
    assert all(r.startswith("--config.") for r in rest)
    if args.command == "train":
        assert (ROOT / args.config).is_file()


def test_files_and_links_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
    for path in re.findall(r"bash (launch/\S+\.sh)", TEXT):
        assert (ROOT / path).is_file(), path


def test_every_subcommand_has_help_with_an_example(capsys, monkeypatch):
    for name in cli.COMMANDS:
        monkeypatch.setattr("sys.argv", ["xomni", name, "--help"])
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args([name, "--help"])
        assert "xomni " + name in capsys.readouterr().out.split("usage:", 1)[1].split("\n", 3)[-1], name
