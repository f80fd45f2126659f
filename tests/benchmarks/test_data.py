"""The benchmark of data: both sides read the same examples of every format, and the table tells which is slower."""

import numpy as np
import pytest

from tests.benchmarks import data
from tests.benchmarks.timing import Case, Result
from xomni_jax.data.files import FilesConfig, FilesSource


@pytest.mark.parametrize("name", data.FORMATS)
def test_both_sides_read_the_same_examples(tmp_path, name):
    write, read = data.FORMATS[name]
    path = write(tmp_path / name, data._examples(7))
    source = FilesSource(FilesConfig(path=str(path), sizes=((data.SIDE, data.SIDE),)), 0, 1)
    for workers in (0, 2):
        case = data._case(name, source, 7, workers, lambda: read(path))
        assert len(set(case.ours())) == 7
        assert case.difference(case.ours(), case.peer()) == 0


def test_the_table():
    def result(ours, peer, ours_cpu):
        case = Case("x", None, None, None, 0.0, 100, "examples")
        return Result(case, *(np.full(3, value) for value in (ours, peer, ours_cpu, peer)), 0.0, 0.0, 0.0)

    measured = [("jsonl", 0, 0.5, result(1.0, 0.9, 2.0)), ("parquet", 2, 0.25, result(2.0, 1.0, 1.0))]
    idle, busy = (data.report(100, measured, others) for others in (0.0, 1.5))
    lines = [line.split() for line in idle.text.splitlines() if line.startswith(("jsonl", "parquet"))]
    assert lines == [
        ["jsonl", "0", "100/s", "111/s", "0.90", "0.45", "0.50", "s"],
        ["parquet", "2", "50/s", "100/s", "0.50", "1.00", "0.25", "s"],
    ]
    assert "Below 0.8 of the bare reader: parquet with 2 threads (0.50)." in idle.text
    assert "Below 0.8 of the bare reader, by CPU time since the machine was busy: jsonl with 0 threads (0.45)." in busy.text
    assert [r["ratio"] for r in busy.data["results"]] == [0.9, 0.5]
