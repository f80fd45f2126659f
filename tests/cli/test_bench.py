"""`xomni bench`: help that teaches, one sentence for what is missing, JSON where it was asked for."""

import argparse
import json
import sys

import pytest

from tests.benchmarks import grpo
from tests.benchmarks.report import Report
from xomni_jax.cli import bench
from xomni_jax.cli.main import main
from xomni_jax.cli.parser import Parser


@pytest.fixture
def parser():
    parser = Parser(prog="xomni bench", epilog=bench.EXAMPLE)
    bench.add_arguments(parser)
    return parser


def test_help_shows_commands_that_parse(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("xomni bench")]
    assert {parser.parse_args(line[2:]).name for line in lines} == set(bench.NAMES)


@pytest.mark.parametrize("name, package", [("decode", "torch"), ("train", "transformers"), ("mmdit", "diffusers")])
def test_a_missing_peer_names_the_extra(name, package, monkeypatch, capsys):
    for other in ("torch", "transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, other, None if other == package else argparse)
    monkeypatch.setattr(argparse, "set_num_threads", lambda n: None, raising=False)
    assert main(["bench", name]) == 2
    fix = "pip install 'xomni_jax[parity]' brings it"
    assert capsys.readouterr().err == f"xomni bench: bench {name} compares with {package}, which is not installed; {fix}\n"


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "decode --model somewhere",
            "--model belongs to bench grpo, eval, tokenize, rewards, serve, window, scaling, start, decoder-price; bench decode does not",
        ),
        ("grpo --size small", "--size belongs to bench decode, train, mmdit, device; bench grpo does not take it"),
        ("device --size small", "--size small: bench device has the sizes tiny and 1b"),
        ("decode --size 1b", "--size 1b: bench decode has the sizes tiny and small"),
        ("grpo --threads 1", "--threads belongs to bench decode, train, mmdit"),
        ("train --threads 9999", "--threads 9999: this process has .* cores; give a number from 1 to that"),
        ("train --repeats 0", "--repeats 0 and --seconds 60 must be above 0"),
        ("mmdit --seconds nan", "--seconds nan must be above 0"),
        ("mmdit --json /no/such/folder/a.json", "there is no folder /no/such/folder; make it first"),
        ("grpo --model /no/such/model", "/no/such/model: no such directory"),
        ("grpo --config /no/such/config.py", "/no/such/config.py: no such config file"),
    ],
)
def test_errors_are_one_sentence(parser, line, words):
    with pytest.raises(ValueError, match=words):
        bench.run(parser.parse_args(line.split()), [])


def test_the_report_is_printed_and_written(parser, tmp_path, monkeypatch, capsys):
    asked = {}
    (tmp_path / "model.json").write_text('{"format": 1, "components": {}}')

    def measured(config, repeats, seconds):
        asked.update(init_from=config.init_from, repeats=repeats, seconds=seconds)
        return Report("a table", {"benchmark": "grpo"})

    monkeypatch.setattr(grpo, "run", measured)
    args = parser.parse_args(["grpo", "--model", str(tmp_path), "--repeats", "3", "--json", str(tmp_path / "out.json")])
    assert bench.run(args, []) == 0
    assert asked == {"init_from": str(tmp_path), "repeats": 3, "seconds": 60.0}
    assert capsys.readouterr().out.startswith("a table\n")
    assert json.loads((tmp_path / "out.json").read_text()) == {"benchmark": "grpo"}
