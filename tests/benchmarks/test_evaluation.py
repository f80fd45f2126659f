"""The evaluation benchmark: its table, and one measurement in processes of their own."""

import pytest

from tests.benchmarks import evaluation
from tests.benchmarks.timing import BenchError


def test_the_table():
    results = [
        {"suite": "rendered-text", "processes": n, "items_per_second": rate, "items": 90, "seconds": 90 / rate}
        for n, rate in ((1, 10.0), (2, 15.0))
    ]
    judged = [{"questions": 240, "format": "JPEG", "seconds": 3.0, "cpu_seconds": 2.0}]
    report = evaluation.report("a/model", results, judged, 0.5)
    lines = [line.split() for line in report.text.splitlines() if line.startswith("rendered-text")]
    assert lines == [["rendered-text", "1", "10", "1.00", "90", "9", "s"], ["rendered-text", "2", "15", "1.50", "90", "6", "s"]]
    assert [line.split() for line in report.text.splitlines() if "JPEG" in line] == [["240", "JPEG", "3", "s", "2", "s"]]
    assert report.data["results"] == results and report.data["judge"] == judged and report.data["model"] == "a/model"


def test_a_failing_process_says_why():
    with pytest.raises(BenchError, match="eval rendered-qa failed: .*/no/model: no such directory"):
        evaluation._together("/no/model", "rendered-qa", 1)
