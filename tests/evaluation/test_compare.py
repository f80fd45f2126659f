"""Paired comparisons against sums by hand, on runs written by hand."""

import csv
import json
from functools import partial

import numpy as np
import pytest

from tests.evaluation.made_runs import CATEGORIES, write_answer_run, write_generate_run
from xomni_jax.cli.main import main
from xomni_jax.evaluation.compare import compare, most_changed, read_runs, table_text, write_comparison
from xomni_jax.evaluation.suite import SuiteError


def lines_of(run):
    """Items as the run stored them."""
    return [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]


def rewrite(run, change):
    """Changes the stored items of a run."""
    (run / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines_of(run))))


def interval_by_hand(differences, seed=0, resamples=2000):
    """Percentile bootstrap, one resample at a time."""
    draws = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    means = sorted(sum(differences[i] for i in draw) / len(draw) for draw in draws)
    return means[int(np.floor(0.025 * (resamples - 1)))], means[int(np.ceil(0.975 * (resamples - 1)))]


@pytest.fixture
def three(tmp_path):
    """Runs a, b, c; b lost a score."""
    make = partial(write_generate_run, items=11, repeats=2)
    a, b = make(tmp_path / "a", right=0.3), make(tmp_path / "b", right=0.6, seed=1)
    c = make(tmp_path / "c", right=0.6, seed=2, guidance=2.0)
    rewrite(b, lambda lines: [line | {"score": None} if line["id"] == "0003" else line for line in lines])
    return a, b, c


def test_numbers_by_hand(three):
    comparison = compare(read_runs(three))
    scores = [{line["id"]: line["score"] for line in lines_of(run)} for run in three]
    category = {line["id"]: line["fields"]["category"] for line in lines_of(three[0])}
    assert [row["name"] for row in comparison["rows"]] == ["all items", *CATEGORIES]
    for row in comparison["rows"]:
        ids = [name for name in sorted(category) if row["name"] in ("all items", category[name])]
        assert row["items"] == len(ids)
        for other, difference in zip(scores[1:], row["differences"]):
            each = [other[name] - scores[0][name] for name in ids if other[name] is not None]
            assert difference["items"] == len(each) and difference["value"] == pytest.approx(sum(each) / len(each))
            assert difference["ci95"] == pytest.approx(interval_by_hand(each))
    # What changed most, over both differences.
    size = {n: max(abs(s[n] - scores[0][n]) for s in scores[1:] if s[n] is not None) for n in category}
    order = [comparison["items"][i]["id"] for i in most_changed(comparison, 5)]
    assert [size[name] for name in order] == sorted(size.values(), reverse=True)[:5]
    assert comparison["settings"] == {"sampling.guidance": [1.0, 1.0, 2.0]}


def test_files_and_page(three, tmp_path, capsys):
    assert main(["compare", *map(str, three), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == f"report: {tmp_path / 'out' / 'compare.html'}" and "sampling.guidance: 1.0 | 1.0 | 2.0" in said
    comparison = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = list(csv.reader((tmp_path / "out" / "compare.csv").open()))
    assert rows[0] == ["id", "category", "a", "b", "c", "b minus a", "c minus a"] and len(rows) == 12
    assert rows[4][3] == rows[4][5] == "" and float(rows[1][5]) == pytest.approx(float(rows[1][3]) - float(rows[1][2]))
    page = (tmp_path / "out" / "compare.html").read_text()
    changed = most_changed(comparison)
    assert page.count("<article") == len(changed) and page.count("data:image/png;base64,") == 3 * 2 * len(changed)
    assert '<a class="shown" href="../a/images/' in page and "<link" not in page and "http://" not in page
    value = comparison["rows"][0]["differences"][1]["value"]
    for text in (page, table_text(comparison)):
        assert f"{value:+.4f}" in text and ", 10 items" in text  # of 11, one without a score


def test_headlines_come_first_and_say_when_they_are_not_comparable(tmp_path, capsys):
    part = write_generate_run(tmp_path / "part", items=3, repeats=1, objections=["the judge is pp-ocr"])
    runs = [part, write_generate_run(tmp_path / "whole", items=3, repeats=1, right=1.0, seed=1)]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said, page = capsys.readouterr().out, (tmp_path / "out" / "compare.html").read_text()
    values = [json.loads((run / "results.json").read_text())["headline"]["value"] for run in runs]
    between = f"{values[1] - 0.0196:.4f} to {values[1] + 0.0196:.4f}"
    assert f"whole: {values[1]:.4f} (text accuracy; 95% interval {between}; {values[1] - values[0]:+.4f} against part)" in said
    assert page.index(f"<strong>{values[1]:.4f}</strong>") < page.index("<table>") and between in page
    assert "part: not comparable with published numbers: the judge is pp-ocr" in said and "whole: not comparable" not in said
    assert "<li><b>part</b>: the judge is pp-ocr</li>" in page
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert [run["not_comparable"] for run in stored] == [["the judge is pp-ocr"], []] and "interval" in stored[0]["headline"]


def test_without_out_nothing_is_written(three, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", str(three[0]), str(three[1])]) == 0
    assert "all items" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_answers_are_compared_side_by_side(tmp_path):
    runs = read_runs([write_answer_run(tmp_path / "a"), write_answer_run(tmp_path / "b", right=0.2, seed=1)])
    comparison = compare(runs)
    assert write_comparison(runs, comparison, tmp_path).read_text().count("<article") == len(most_changed(comparison)) > 0


def test_runs_called_alike_are_named_by_path(tmp_path):
    runs = read_runs([write_generate_run(tmp_path / x / "run", items=3, repeats=1) for x in "ab"])
    assert [run["name"] for run in compare(runs)["runs"]] == [str(run.path) for run in runs]
    assert not most_changed(compare(runs))
    assert "No score changed" in write_comparison(runs, compare(runs), tmp_path).read_text()


def test_what_cannot_be_paired_is_refused_by_name(tmp_path, capsys):
    a = write_generate_run(tmp_path / "a", items=4, repeats=1)
    other = write_generate_run(tmp_path / "other", items=4, repeats=1, suite="longtext-zh")
    more = write_generate_run(tmp_path / "more", items=6, repeats=1)
    with pytest.raises(SuiteError, match=f"{a} is a run of longtext-en, {other} one of longtext-zh"):
        read_runs([a, other])
    with pytest.raises(SuiteError, match=rf"different items: 2 only in {more} \(0004, 0005\)"):
        read_runs([a, more])
    with pytest.raises(SuiteError, match="at least two runs"):
        read_runs([a])
    assert main(["compare", str(a), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"xomni compare: {tmp_path / 'none'}: no results.json here; make a run first")
