"""LongText-Bench against the official functions' numbers, and its files."""

import json

import pytest
from PIL import Image

from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.evaluation.suites import get_suite, longtext


def item(text, language="en", id="0000"):
    return Item(id, "p", {"text": text, "language": language, "category": "sign", "length": "short"})


@pytest.mark.parametrize("language", ["en", "zh"])
def test_one_image(language):
    suite = get_suite(f"longtext-{language}")
    for example in EXAMPLES[f"longtext_{language}"]:
        join = " ".join if language == "en" else "".join
        assert longtext.clean(example["judge_output"]) == example["cleaned"]
        assert join(longtext.tokens(example["cleaned"], language)) == example["ocr_norm"]
        assert join(longtext.tokens(" ".join(example["text"]), language)) == example["gt_norm"]
        record = suite.score(item(example["text"], language), [[example["judge_output"]]])
        assert (record["match"], record["gt"], record["score"]) == (example["match"], example["gt_count"], example["accuracy"])
        assert record["read"] == [example["cleaned"]]


def test_the_score_is_a_ratio_of_sums():
    example = EXAMPLES["longtext_en_corpus"]
    items = [item(r["gt"], id=f"{n:04d}") for n, r in enumerate(example["records"])]
    suite = get_suite("longtext-en")
    result = suite.aggregate(as_records(suite, items, [[[r["judge_output"]]] for r in example["records"]]))
    assert result["scores"]["text accuracy"] == example["score"] != example["mean_of_per_image_ratios_not_used"]
    assert result["categories"] == {"sign": {"score": 0.4, "items": 2}}


def test_the_switch_cleans_what_the_official_loop_leaves():
    replies = [["addCriterion Sold out"], ["No text recognized"]]
    plain = get_suite("longtext-en").score(item(["no criterion"]), replies)
    clean = get_suite("longtext-en", ["clean-replies"]).score(item(["no criterion"]), replies)
    assert (plain["match"], clean["match"]) == (1, 0)  # "no" of "No text recognized" matched
    assert clean["read"] == [" Sold out", ""]


def row(**changes):
    return {"category": "sign", "length": "short", "prompt": "a sign", "text": ["Hi"], "text_length": 1, "prompt_id": 3} | changes


def write(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_loads_and_keeps_published_order(tmp_path):
    write(tmp_path / "text_prompts.jsonl", [row(prompt_id=7), row(prompt_id=3, category="label")])
    items = get_suite("longtext-en").load(tmp_path)
    assert [i.id for i in items] == ["0007", "0003"]
    assert items[1].fields["category"] == "label" and items[0].prompt == "a sign"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), '{"category": \n'], r"text_prompts.jsonl:2: it is not JSON"),
        ([row(), row()], r"jsonl:2: the id '0003' was used before, at .*jsonl:1"),
        ([row(prompt_id=None)], r"jsonl:1: the field 'prompt_id' is missing"),
        ([row(text=["?!"])], r"jsonl:1: the ground truth \['\?!'\] holds nothing that is counted"),
        ([row(text=[])], r"jsonl:1: the field 'text' is an empty list"),
        ([row(prompt=" ")], r"jsonl:1: the field 'prompt' is empty"),
        ([row(prompt_id="x")], r"jsonl:1: the field 'prompt_id' is 'x', not a whole number"),
        (["[1]\n"], r"jsonl.0.: it is no object"),
        ([], r"holds no rows"),
    ],
)
def test_bad_files(tmp_path, rows, message):
    write(tmp_path / "text_prompts.jsonl", rows)
    with pytest.raises(SuiteError, match=message):
        get_suite("longtext-en").load(tmp_path)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(SuiteError, match="has no text_prompts_zh.jsonl; it must hold .*X-Omni-Team/X-Omni"):
        get_suite("longtext-zh").load(tmp_path)
    with pytest.raises(SuiteError, match="does not exist"):
        get_suite("longtext-zh").load(tmp_path / "nowhere")


def test_images_in_the_official_layout(tmp_path):
    suite = get_suite("longtext-en")
    drawn = [Image.new("RGB", (16, 8), (40 * k, 0, 0)) for k in range(4)]
    suite.save(tmp_path, item(["x"]), drawn)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0000_{k}.png" for k in range(4)]
    assert [p.getpixel((0, 0)) for p in suite.open(tmp_path, item(["x"]))] == [p.getpixel((0, 0)) for p in drawn]
    (tmp_path / "0000_2.png").unlink()
    with pytest.raises(SuiteError, match="0000_2.png is missing"):
        suite.open(tmp_path, item(["x"]))
    (tmp_path / "0000_2.png").write_bytes(b"no image")
    with pytest.raises(SuiteError, match="0000_2.png cannot be read"):
        suite.open(tmp_path, item(["x"]))


@needs_published
@pytest.mark.parametrize("name", ["longtext-en", "longtext-zh"])
def test_published_prompts(name):
    items = get_suite(name).load(PUBLISHED)
    assert len(items) == 160 == get_suite(name).published
    assert {i.fields["length"] for i in items} == {"short", "long"} and len({i.fields["category"] for i in items}) == 8
