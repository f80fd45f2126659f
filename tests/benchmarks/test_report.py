"""The printed table, the sentence about losses, and the JSON."""

import json
import os
import re
import time

import numpy as np
import pytest

from tests.benchmarks import machine, report
from tests.benchmarks.timing import Case, Result


def result(name, ratio, yardstick=False):
    case = Case(name, None, None, None, 1e-4, 10, "tokens", yardstick)
    ours_s = np.array([0.02, 0.01, 0.04])
    return Result(case, ours_s, ratio * ours_s, np.full(3, 0.1), np.full(3, 0.25), 1.5, 0.03, 2e-6)


@pytest.mark.parametrize("seconds, text", [(2.5, "2.5 s"), (0.01234, "12.3 ms"), (0.00085, "850 us")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_comparison_prints_and_saves_the_same():
    results = [result("batch 1", 3.0), result("products", 0.5, True)]
    made = report.comparison("decode", "a title", results, ["numpy"], (2, 2), 0.1, "why")
    row = next(line for line in made.text.splitlines() if line.startswith("batch 1 "))
    assert row.split() == "batch 1 20 ms 60 ms 3.00 3.00 to 3.00 2.50 3 500 tokens/s 1.5 s 30 ms".split()
    assert f"threads: ours 2, peer 2; other programs took 0.1 of {os.cpu_count()} cores" in made.text
    assert f"numpy {np.__version__}" in made.text
    data = json.loads(json.dumps(made.data))
    assert [r["ratio"]["median"] for r in data["results"]] == pytest.approx([3.0, 0.5])
    assert data["threads"] == {"ours": 2, "peer": 2} and data["other_programs_cores"] == 0.1
    assert data["versions"]["peer"] == {"numpy": np.__version__} and data["versions"]["ours"]["jax"]
    assert data["verdict"] == made.text.splitlines()[-1] and data["machine"]["cores"] == machine.cores()


@pytest.mark.parametrize(
    "cases, words",
    [
        ([("a", 2.0), ("products", 1.1)], "slower in no case here. Its matrix products alone have the ratio 1.10"),
        ([("a", 2.0), ("b", 0.6), ("products", 0.7)], r"at b \(0.60\) because XLA's matrix products are: alone, .* ratio 0.70"),
        ([("a", 0.5), ("products", 1.2)], r"at a \(0.50\), not for its matrix products \(alone: 1.20\) but for .*: rest is slow"),
        ([("a", 0.5), ("products", 0.9)], "not for its matrix products"),
    ],
)
def test_the_sentence_follows_from_the_numbers(cases, words):
    results = [result(name, ratio, name == "products") for name, ratio in cases]
    assert re.search(words, report.verdict(results, "rest is slow"))
    assert report.verdict(results, "rest is slow", threads=2, others=0.1) == report.verdict(results, "rest is slow")


def test_a_busy_machine_is_judged_by_processor_time_or_not_at_all():
    results = [result("a", 0.5), result("products", 0.5, True)]  # both 2.5 by processor time
    said = report.verdict(results, "", threads=1, others=1.5)
    assert said.startswith("By CPU time, since the machine was busy: ours is slower in no case")
    assert report.verdict(results, "", threads=2, others=1.5).startswith("No verdict: other programs took 1.5 cores")
    assert "other programs" not in report.machine_line("threads: 2", None)


def test_our_own_work_is_not_that_of_others():
    others = machine.Others()
    assert others._began[0] is None or others.cores() >= 0
    others._began = (machine._cpu_seconds() or 0.0) - 1.0, time.process_time() - 1.0, time.perf_counter() - 1.0
    assert others.cores() is None or others.cores() < 0.5


def test_threads_of_xla_are_counted():
    assert machine.xla_threads() >= 1
