"""`xomni serve-reward`: help that teaches, options that fit their scorer."""

import argparse

import pytest

from xomni_jax.cli import serve_reward
from xomni_jax.rewards.services.base import SCORERS


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(
        prog="xomni serve-reward", epilog=serve_reward.EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    serve_reward.add_arguments(parser)
    return parser


def test_help_shows_a_command_that_parses(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith("xomni serve-reward"))
    assert parser.parse_args(line.split()[2:]).port == 8001
    assert "/health" in text and all(name in text for name in SCORERS)


def test_names_are_those_that_can_be_served():
    assert set(serve_reward.NAMES) == set(SCORERS)


@pytest.mark.parametrize(
    "line, words",
    [
        ("shapes --mode crop", "--mode belongs to ocr"),
        ("ocr --references images", "--references belongs to quality"),
        ("ocr --workers 0", "--workers 0 must be at least 1"),
        ("ocr --port 99999", "port 99999 on 127.0.0.1 cannot be used"),
    ],
)
def test_errors_are_one_sentence(parser, line, words):
    args = parser.parse_args(line.split())
    with pytest.raises(ValueError, match=words):
        serve_reward.run(args, [])
