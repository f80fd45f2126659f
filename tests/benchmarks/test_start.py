"""`xomni bench start`: what is measured of a command, and its rows."""

import sys

import pytest

from tests.benchmarks import start
from tests.benchmarks.timing import BenchError

COMPILES = (
    "import os, pathlib; p = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']); p.mkdir(exist_ok=True); (p / 'f-1-cache').touch()"
)


def test_programs_are_counted_once(tmp_path):
    cold, warm = (start.measure([sys.executable, "-c", COMPILES], tmp_path / "cache") for _ in range(2))
    assert (cold["compiled"], warm["compiled"]) == (1, 0) and cold["seconds"] > 0


def test_a_command_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(BenchError, match="^-c raise SystemExit.* failed: why$"):
        start.measure([sys.executable, "-c", "raise SystemExit('why')"], tmp_path)


def test_rows_and_verdicts(monkeypatch):
    seconds = iter((1.0, 6.0, 2.0, 3.0, 2.5, 9.0, 8.0))
    lines = []
    monkeypatch.setattr(
        start, "measure", lambda line, cache: lines.append(line) or {"seconds": next(seconds), "cpu_seconds": 1, "compiled": 0}
    )
    report = start.run("MODEL")
    assert [r["name"] for r in report.data["rows"]] == [name for name, _ in start.ROWS]
    assert "5 s: MISSED" in report.text and report.text.count("2.5 s: reached") == 2
    assert [line.count("--model") for line in lines] == [0, 1, 1, 1, 1, 0, 0] and len({tuple(line) for line in lines}) == 6
