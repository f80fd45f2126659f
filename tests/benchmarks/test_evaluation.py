"""The rate of an evaluation: only the time in which all processes work counts."""

import pytest

from xomni_jax.benchmarks import evaluation
from xomni_jax.benchmarks.timing import BenchError


def test_one_process_without_its_first_batch():
    assert evaluation.rate([[10.0, 11.0, 11.0, 13.0]]) == {"items_per_second": 1.0, "items": 3, "seconds": 3.0}


def test_two_processes_while_both_work():
    early, late = [10.0, 12.0, 14.0, 16.0], [13.0, 14.0, 15.0, 17.0, 20.0]
    found = evaluation.rate([early, late])  # from 13 to 16: two of the early one and two of the late one
    assert found == {"items_per_second": 4 / 3, "items": 4, "seconds": 3.0}


def test_processes_that_never_work_together():
    with pytest.raises(BenchError, match="not at work at the same time"):
        evaluation.rate([[1.0, 2.0], [3.0, 4.0]])


def test_the_table():
    results = [
        {"suite": "rendered-text", "processes": n, "items_per_second": rate, "items": 90, "seconds": 90 / rate} for n, rate in ((1, 10.0), (2, 15.0))
    ]
    report = evaluation.report("a/model", results, 0.5)
    lines = [line.split() for line in report.text.splitlines() if line.startswith("rendered-text")]
    assert lines == [["rendered-text", "1", "10", "1.00", "90", "9", "s"], ["rendered-text", "2", "15", "1.50", "90", "6", "s"]]
    assert report.data["results"] == results and report.data["model"] == "a/model"
