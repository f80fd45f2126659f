"""Which results may stand beside published numbers; which items a sample holds; how exact a headline is."""

import dataclasses
import math

import numpy as np
import pytest

from xomni_jax.evaluation.comparable import SIZE, departures, wording_hash
from xomni_jax.evaluation.statistics import JACKKNIFE_GROUPS, jackknife_error
from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suite_run import EvalConfig, SuiteRun, sample
from xomni_jax.evaluation.suites import get_suite

JUDGE = {"name": "Qwen/Qwen2.5-VL-7B-Instruct", "settings": {}}
DRAWN = dict(zip(("height", "width"), SIZE))
FIELDS = {"text": ["a"], "language": "en"}


def run_of(name, items, switches=(), config=None, **how):
    """A run of that many items of a suite."""
    suite = get_suite(name, switches, how.pop("instructions", None))
    listed = [Item(str(n), "p", FIELDS | {"metadata": {"include": []}}) for n in range(items)]
    return SuiteRun(config or EvalConfig(name, "."), suite, listed, {"items": items}, {}, None)


def clauses(run, judge=JUDGE, settings=DRAWN, **how):
    """What a run departs in, once its judge was asked."""
    run.suite.questions(run.items[0])
    return departures(run, judge, settings, **how)


def test_a_run_as_published_is_comparable(monkeypatch):
    """The published wording is not in this repository, so one of our own takes its place."""
    from xomni_jax.evaluation import comparable

    monkeypatch.setitem(comparable._WORDINGS, "ocr", (wording_hash("The published words."),))
    run = run_of("longtext-en", 160, instructions={"ocr": "The  published\nwords. "})
    assert clauses(run) == []
    assert clauses(run, JUDGE | {"name": "qwen2.5-vl-7b-instruct"}) == []


@pytest.mark.parametrize(
    "change, clause",
    [
        ({"items": 159}, "159 of 160 items"),
        ({"judge": {"name": "pp-ocr", "settings": {}}}, "judge pp-ocr instead of Qwen2.5-VL-7B-Instruct"),
        ({"judge": JUDGE | {"settings": {"format": "JPEG"}}}, "images shown to the judge as JPEG"),
        ({"settings": DRAWN | {"width": 512}}, "images of 1152 x 512 pixels instead of 1152 x 1152"),
        ({"unscored": 3}, "3 items without a score"),
        ({"switches": ["clean-replies"]}, "switch clean-replies, which departs from the official scorer"),
        ({"config": EvalConfig("longtext-en", ".", rewrite="x")}, "rewritten prompts, the published ones are not public"),
        ({}, "instruction 'ocr' in other words than the published ones, which --instruction ocr=FILE gives"),
    ],
)
def test_every_departure_is_said(change, clause):
    run = run_of("longtext-en", **{"items": 160} | {k: v for k, v in change.items() if k in ("items", "switches", "config")})
    found = clauses(run, **{k: v for k, v in change.items() if k in ("judge", "settings", "unscored")})
    assert clause in found and len(found) == 1 + bool(change)


def test_other_kinds_of_suites():
    assert departures(run_of("rendered-qa", 3), None, {}) == ["no number is published for this suite"]
    assert departures(run_of("ocrbench", 1000), None, {}) == []  # local rules, the question alone
    detector = {"name": "detector", "settings": {"version": "mask2former-1/clip-2"}}
    assert any(clause.startswith("judge detector instead of Mask2Former") for clause in clauses(run_of("geneval", 553), detector))
    run = run_of("geneval", 553)
    run.suite.repeats = 1
    assert "1 images per prompt instead of 4" in clauses(run, detector)


def test_the_wordings_that_decided_a_result_are_those_that_were_read():
    run = run_of("gqa", 10)
    assert run.suite.instructions.used == set() and departures(run, None, {}) == []
    assert run.suite.instructions["word"].startswith("{question}") and departures(run, None, {}) == []  # lmms-eval's
    own = run_of("gqa", 10, instructions={"word": "{question} Be brief."})
    assert own.suite.instructions["word"] and len(departures(own, None, {})) == 1


# ---- samples ----
def items(counts, group=None):
    """Items of categories of these sizes."""
    names = [(c, n) for c, count in counts.items() for n in range(count)]
    return [Item(f"{c}{n}", "p", {"category": c} | ({"group": n // group} if group else {})) for c, n in names]


def test_a_sample_has_every_category_in_proportion_and_a_larger_one_contains_it():
    known = items({"a": 100, "b": 50, "c": 10})
    before = set()
    for number in (8, 16, 32, 64, 160):
        drawn = sample(known, number, 7)
        shares = [sum(name[0] == c for name in drawn) for c in "abc"]
        assert len(drawn) == number and before <= drawn
        assert all(abs(share - number * of / 160) <= 1 for share, of in zip(shares, (100, 50, 10)))
        before = drawn
    assert sample(known, 16, 7) == sample(list(reversed(known)), 16, 7) != sample(known, 16, 8)


def test_rotations_of_a_question_stay_together():
    drawn = sample(items({"a": 40}, group=4), 3, 0)
    groups = [int(name[1:]) // 4 for name in drawn]
    assert len(drawn) == 12 and all(groups.count(g) == 4 for g in groups)


# ---- standard errors ----
def test_the_error_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(size=60)
    mean = lambda rows: sum(rows) / len(rows)
    assert jackknife_error([[v] for v in values], mean) == pytest.approx(values.std(ddof=1) / math.sqrt(60))
    twice = jackknife_error([[v, v] for v in values], mean)  # two answers about one image tell as much as one
    assert twice == pytest.approx(jackknife_error([[v] for v in values], mean))


def test_many_clusters_are_grouped_and_a_ratio_is_close_to_its_error():
    rng = np.random.default_rng(2)
    pairs = [(int(x), 4) for x in rng.binomial(4, 0.3, 50 * JACKKNIFE_GROUPS)]
    ratio = lambda rows: sum(a for a, _ in rows) / sum(b for _, b in rows)
    expected = math.sqrt(0.3 * 0.7 / (4 * len(pairs)))
    assert jackknife_error([[pair] for pair in pairs], ratio) == pytest.approx(expected, rel=0.3)


def test_what_is_not_known_is_not_made_up():
    assert math.isnan(jackknife_error([[1.0]], sum)) and math.isnan(jackknife_error([[1.0], [2.0]], lambda rows: None))


def test_repeats_replace_those_of_the_suite(tmp_path):
    from xomni_jax.evaluation.run import open_run

    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "x.txt").write_text("p")
    config = EvalConfig("dpg", tmp_path / "out", tmp_path, repeats=9)
    assert open_run(config).suite.repeats == 9 and open_run(dataclasses.replace(config, repeats=None)).suite.repeats == 4
