"""Flags of a dataclass: types, defaults, explanations."""

import argparse
from dataclasses import dataclass
from typing import Literal

import pytest

from xomni_jax.core.options import add_flags


@dataclass(frozen=True)
class Options:
    """Settings of a thing.

    Attributes:
      model: where it is.
      max_size: pixels at most,
        50% of them used.
      mode: how.
      exact: whether it is.
    """

    model: str
    max_size: int = 3
    scale: float | None = None
    mode: Literal["fast", "good"] | None = None
    exact: bool = True


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="thing")
    add_flags(parser, Options)
    return parser


def parsed(parser, line):
    return Options(**vars(parser.parse_args(line.split())))


def test_values_have_the_types_of_their_fields(parser):
    assert parsed(parser, "--model m") == Options("m")
    assert parsed(parser, "--model m --max-size 4 --scale 2 --mode good --no-exact") == Options("m", 4, 2.0, "good", False)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "required: --model"),
        ("--model m --max-size wide", "--max-size: invalid int value: 'wide'"),
        ("--model m --mode slow", "--mode: invalid choice: 'slow'"),
        ("--model m --colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_nonsense_is_refused(parser, line, words, capsys):
    with pytest.raises(SystemExit):
        parsed(parser, line)
    assert words in capsys.readouterr().err


def test_help_explains_every_field(parser):
    told = " ".join(parser.format_help().split())
    assert "--model STR where it is" in told and "--max-size INT pixels at most, 50% of them used (default 3)" in told
    assert "--mode {fast,good} how" in told and "whether it is (default True)" in told
