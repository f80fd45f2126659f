"""GenEval's rules against the official functions' verdicts, and its files."""

import json

import pytest
from PIL import Image

from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.evaluation.suites.geneval import counted_boxes, judge, relations


@pytest.mark.parametrize("example", EXAMPLES["geneval"], ids=lambda e: e["metadata"]["tag"])
def test_verdicts(example):
    assert judge(example["metadata"], example["detections"]) == (example["correct"], example["reason"])
    assert {name: len(boxes) for name, boxes in counted_boxes(example["detections"], example["metadata"]["tag"]).items()} == example["kept"]


@pytest.mark.parametrize("example", EXAMPLES["geneval_relative_position"])
def test_relations(example):
    assert relations(example["a"], example["b"]) == example["relations_of_a_to_b"]


def box(score=0.9, color="red", at=(0, 0, 10, 10)):
    return {"box": list(at), "score": score, "color": color}


def test_thresholds_are_strict_and_at_most_16_boxes_count():
    assert counted_boxes({"cat": [box(0.3)]}, "colors") == {} == counted_boxes({"cat": [box(0.9)]}, "counting")
    many = counted_boxes({"cat": [box(0.31 + n / 100) for n in range(20)]}, "two_object")["cat"]
    assert len(many) == 16 and many[0]["score"] == 0.5 and many[-1]["score"] == 0.35


def test_a_failed_target_fails_its_clause():
    metadata = {
        "tag": "position",
        "include": [{"class": "bed", "count": 1}, {"class": "cup", "count": 1, "position": ["above", 0]}],
    }
    assert judge(metadata, {"cup": [box()]}) == (False, "expected bed>=1, found 0\nno target for cup to be above")


def test_overall_is_the_mean_of_tags():
    suite = get_suite("geneval")
    rows = [("a", "0"), ("b", "1")]
    items = [Item(n, "p", {"category": t, "metadata": {"tag": t, "include": [{"class": "cat", "count": 1}]}}) for t, n in rows]
    cat, none = [{"cat": [box()]}], [{}]
    records = as_records(suite, items, [[cat, none], [cat]])
    result = suite.aggregate(records)
    assert result["scores"]["overall"] == 0.75 and result["scores"]["correct images"] == 2 / 3
    assert result["scores"]["prompts with a correct image"] == 1.0
    assert result["categories"] == {"a": {"score": 0.5, "items": 1}, "b": {"score": 1.0, "items": 1}}
    assert records[0]["verdicts"] == ["correct", "expected cat>=1, found 0"]


def row(**changes):
    return {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"} | changes


def test_loads_asks_and_saves(tmp_path):
    rows = [row(), row(tag="counting", include=[{"class": "cat", "count": 2}], exclude=[{"class": "cat", "count": 3}])]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    suite = get_suite("geneval")
    first, second = suite.load(tmp_path)
    assert (first.id, second.id) == ("00000", "00001")
    assert suite.questions(first)[0]["coloured"] == ["cat"] and suite.questions(second)[0]["coloured"] == []
    suite.save(tmp_path, first, [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(4)])
    assert sorted(p.name for p in (tmp_path / "00000" / "samples").iterdir()) == [f"{k:04d}.png" for k in range(4)]
    assert json.loads((tmp_path / "00000" / "metadata.jsonl").read_text()) == rows[0]
    assert [p.getpixel((0, 0))[0] for p in suite.open(tmp_path, first)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(include=[]), "'include' is empty"),
        (row(include=[{"class": "cat"}]), "include clause 0 has count None"),
        (row(include=[{"count": 1}]), "include clause 0 has the class None"),
        (row(include=[{"class": "cat", "count": 1, "color": "mauve"}]), "the colour 'mauve'"),
        (row(include=[{"class": "cat", "count": 1, "position": ["above", 0]}]), "index of an earlier clause"),
        (row(tag=""), "jsonl:2: the field 'tag' is empty"),
    ],
)
def test_bad_rows(tmp_path, bad, message):
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(SuiteError, match=message):
        get_suite("geneval").load(tmp_path)


@needs_published
def test_published_prompts():
    items = get_suite("geneval").load(PUBLISHED)
    tags = [i.fields["category"] for i in items]
    assert {t: tags.count(t) for t in set(tags)} == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
