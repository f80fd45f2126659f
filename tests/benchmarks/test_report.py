"""The printed table, the sentence about losses, and the JSON."""

import json
import re

import numpy as np
import pytest

from xomni_jax.benchmarks import machine, report
from xomni_jax.benchmarks.timing import Case, Result


def result(name, ratio, yardstick=False):
    case = Case(name, None, None, None, 1e-4, 10, "tokens", yardstick)
    ours_s = np.array([0.02, 0.01, 0.04])
    return Result(case, ours_s, ratio * ours_s, np.full(3, 0.1), np.full(3, 0.25), 1.5, 0.03, 2e-6)


def test_columns_line_up():
    lines = report.table([("", "ours"), ("a long name", "1"), ("b", "22.5 ms")]).splitlines()
    assert lines == ["                ours", "-----------  -------", "a long name        1", "b            22.5 ms"]


@pytest.mark.parametrize("seconds, text", [(2.5, "2.5 s"), (0.01234, "12.3 ms"), (0.00085, "850 us")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_comparison_prints_and_saves_the_same():
    results = [result("batch 1", 3.0), result("products", 0.5, True)]
    made = report.comparison("decode", "a title", results, ["numpy"], (2, 2), (0.5, 0.7), "why")
    row = next(line for line in made.text.splitlines() if line.startswith("batch 1 "))
    assert row.split() == "batch 1 20 ms 60 ms 3.00 3.00 to 3.00 2.50 3 500 tokens/s 1.5 s 30 ms".split()
    assert "threads: ours 2, peer 2; load 0.5 before and 0.7 after" in made.text and f"numpy {np.__version__}" in made.text
    data = json.loads(json.dumps(made.data))
    assert [r["ratio"]["median"] for r in data["results"]] == pytest.approx([3.0, 0.5])
    assert data["threads"] == {"ours": 2, "peer": 2} and data["load"] == {"before": 0.5, "after": 0.7}
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
    assert report.verdict(results, "", by_cpu_time=True).startswith("By CPU time, since the machine was busy: ours is slower in")


def test_a_busy_machine_is_said():
    assert "busy with other work" in report.machine_line("threads: 2", (machine.cores() + 5.0, 1.0))
    assert "busy" not in report.machine_line("threads: 2", (0.1, 0.2))
    assert "load" not in report.machine_line("threads: 2", (None, None))


def test_threads_of_xla_are_counted():
    assert machine.xla_threads() >= 1
