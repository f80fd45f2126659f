"""Judging without a model: what is stored, held back and refused; results that are the same however the judge was asked."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from xomni_jax.core.preemption import StopRequested, StopSignal
from xomni_jax.evaluation.judges import DetectorJudge
from xomni_jax.evaluation.judging import FEW
from xomni_jax.evaluation.results import NOT_READ
from xomni_jax.evaluation.run import EvalConfig, evaluate
from xomni_jax.evaluation.run_directory import RunDirectory
from xomni_jax.evaluation.suite import Item, JudgeUnavailable, Suite, SuiteError, unreadable, write_image
from xomni_jax.rewards.client import Score

ITEMS, REPEATS = 12, 2


class Shades(Suite):
    """Is an image bright? Image k of item n has the grey value 20 n + k, and the judge says it."""

    judge, repeats = "vqa", REPEATS

    def load(self, data):
        return [Item(f"{n:02d}", "grey", {"category": "ab"[n % 2]}) for n in range(ITEMS)]

    def questions(self, item):
        return ({"instruction": "How bright?", "max_tokens": 8},)

    def score(self, item, outputs):
        read = [reply for (reply,) in outputs]
        return {"score": sum(map(int, read)) / len(read) / 255, "read": read, "verdicts": [f"{r}!" for r in read], "unparsed": 0}

    def aggregate(self, records):
        return {"headline": "grey", "scores": {"grey": sum(r["score"] for r in records) / len(records)}, "categories": {}}


class Grey:
    """Says the grey value; `fails` says what else to say instead, by that value."""

    name, settings = "grey", {"version": 1}

    def __init__(self, fails=None, concurrency=1, before=lambda: None):
        self.fails, self.concurrency, self.asked, self.before = fails or {}, concurrency, [], before

    def ask(self, images, questions):
        """One reply per image."""
        self.before()
        values = [image.getpixel((0, 0))[0] for image in images]
        self.asked += values
        for value in values:
            if isinstance(self.fails.get(value), Exception):
                raise self.fails[value]
        return [[self.fails.get(value, str(value)) for _ in asked] for value, asked in zip(values, questions)]


@pytest.fixture
def out(tmp_path):
    """A function that makes a run directory with the images of another program."""

    def make(name="out"):
        for n in range(ITEMS):
            for k in range(REPEATS):
                write_image(tmp_path / name / "images" / f"{n:02d}_{k}.png", Image.new("RGB", (4, 4), (20 * n + k,) * 3))
        return tmp_path / name

    return make


def judged(out, judge, stop=None, **how):
    """The bytes of the results."""
    evaluate(EvalConfig(Shades(), out, phase="score", **{"report": False} | how), judge=judge, stop=stop)
    return [(out / name).read_bytes() for name in ("results.json", "items.jsonl")]


def test_a_few_unreadable_replies_take_no_part_and_are_listed(out):
    fails = {40: unreadable("no answer"), 60: unreadable("cut"), 61: unreadable("cut")}
    path = out()
    results, items = judged(path, Grey(fails), report=True)
    assert "reply cannot be read" in (path / "report.html").read_text()
    results, items = json.loads(results), [json.loads(line) for line in items.splitlines()]
    assert results["counts"]["unparsed"] == 1 and results["unparsed"] == ["02"]
    assert results["counts"]["unscored items"] == 1 and results["unscored"] == ["03"]
    means = [(41 if n == 2 else 20 * n + 0.5) / 255 for n in range(ITEMS) if n != 3]
    assert results["headline"]["value"] == pytest.approx(np.mean(means))
    assert items[2]["verdicts"] == [NOT_READ, "41!"] and items[2]["record"]["read"] == ["", "41"]
    assert items[3]["score"] is None and items[3]["verdicts"] == [NOT_READ] * 2 and items[3]["replies"] == [[fails[60]], [fails[61]]]


@pytest.mark.parametrize("bad", [range(0, 256), [20 * n for n in range(FEW)]])
def test_too_many_unreadable_replies_stop_the_run_which_goes_on_when_the_judge_is_mended(out, bad):
    whole, path = judged(out("whole"), Grey()), out()
    with pytest.raises(SuiteError, match=r"replies of the judge cannot be read, the first is of item \d\d: only thought; mend the judge"):
        judged(path, Grey({value: unreadable("only thought") for value in bad}))
    stored = RunDirectory(path).lines("judged")
    assert not any("unreadable" in reply for record in stored.values() for (reply,) in record["replies"])
    assert not (path / "results.json").exists()
    mended = Grey()
    assert judged(path, mended) == whole
    assert len(mended.asked) == REPEATS * (ITEMS - len(stored))  # what was readable is not asked again


def test_few_items_none_of_which_can_be_read_are_no_result(out):
    with pytest.raises(SuiteError, match="4 of 4 replies"):
        judged(out(), Grey({value: unreadable("?") for value in range(256)}), limit=2)


def test_replies_that_the_suite_cannot_read_count_as_well(out):
    class Strict(Shades):
        """Reads nothing."""

        def score(self, item, outputs):
            return {"score": 0.0, "verdicts": ["?"] * len(outputs), "unparsed": len(outputs)}

    with pytest.raises(SuiteError, match=f"{FEW} of {FEW} replies of the judge cannot be read, the first is of item 00: "):
        evaluate(EvalConfig(Strict(), out(), phase="score", report=False), judge=Grey())


def test_results_do_not_depend_on_how_many_items_are_judged_at_a_time_or_by_whom(out):
    whole = judged(out("whole"), Grey())
    together = threading.Barrier(2)  # passes only if two items are under way at once
    assert judged(out("two"), Grey(concurrency=2, before=lambda: together.wait(30))) == whole
    path = out("shares")
    for share in (2, 0, 1):
        evaluate(EvalConfig(Shades(), path, phase="score", report=False, shard=(share, 3)), judge=Grey(concurrency=4))
    assert [(path / name).read_bytes() for name in ("results.json", "items.jsonl")] == whole


def test_what_is_under_way_when_a_judge_goes_away_is_kept(out):
    whole, path = judged(out("whole"), Grey()), out()
    with pytest.raises(JudgeUnavailable, match="gone"):
        judged(path, Grey({80: JudgeUnavailable("gone")}))
    kept = RunDirectory(path).lines("judged")
    assert {"00", "01", "02", "03"} <= set(kept) and "04" not in kept and len(kept) < ITEMS
    again = Grey(concurrency=3)
    assert judged(path, again) == whole and len(again.asked) == REPEATS * (ITEMS - len(kept))


def test_a_stop_keeps_what_is_judged(out):
    class Once(StopSignal):
        """Asks for a stop at the first poll."""

        def reached(self):
            return True

    path, whole = out(), judged(out("whole"), Grey())
    with pytest.raises(StopRequested):
        judged(path, Grey(), Once())
    assert RunDirectory(path).lines("judged") and judged(path, Grey()) == whole


# ---- a detector that sends what no detector may send ----
ROW = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a red bus"}
GOOD = {"bus": [{"box": [0, 0, 3, 3], "score": 0.9, "color": "red"}]}


class Service:
    """In place of the client of the detector."""

    def __init__(self, *details):
        self.details = list(details)

    def score(self, images, items):
        """The next detail for every image."""
        return [Score(1.0, None, self.details.pop(0)) for _ in images]

    def close(self):
        """Nothing to free."""


@pytest.mark.parametrize(
    "bad", [{}, {"detections": None}, {"detections": {"bus": "some"}}, {"detections": {"bus": [{"box": [0, 0, 1, 1], "score": "0.9"}]}}]
)
def test_malformed_detections_are_not_stored_and_the_same_command_goes_on(bad, tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    for n in range(2):
        for k in range(4):
            write_image(tmp_path / "out" / "images" / f"{n:05d}" / "samples" / f"{k:04d}.png", Image.new("RGB", (4, 4)))
    config = EvalConfig("geneval", tmp_path / "out", tmp_path, phase="score", report=False)
    detector = DetectorJudge.__new__(DetectorJudge)
    detector.settings, detector._client = {"version": "1"}, Service(*[{"detections": GOOD}] * 5, bad, bad, bad)
    with pytest.raises(JudgeUnavailable, match="the detector sent a malformed reply: .*; mend the service, the same command goes on"):
        evaluate(config, judge=detector)
    assert len(RunDirectory(config.out).lines("judged")) == 1
    detector._client = Service(*[{"detections": GOOD}] * 4)  # asked about the second item alone
    assert evaluate(config, judge=detector).values["headline"]["value"] == 1.0
