"""What a card says about an item: differences of texts by hand, boxes where the detector saw them."""

import dataclasses
import json
import re

import pytest

from tests.evaluation.made_runs import write_generate_run
from xomni_jax.evaluation.eval_run import read_eval_run
from xomni_jax.evaluation.item_cards import Thumbnail, detected_boxes, embed, image_order, item_card, marked_differences, wanted_text
from xomni_jax.evaluation.pages import HEAD, head_and_rest
from xomni_jax.evaluation.run_report import write_run_report


@pytest.mark.parametrize(
    "wanted, read, parts",
    [
        ("Open daily", "Open daily", [("", "Open daily")]),
        ("Open", "0pen", [("del", "O"), ("ins", "0"), ("", "pen")]),
        ("cafe bar", "cafebars", [("", "cafe"), ("del", " "), ("", "bar"), ("ins", "s")]),
        ("欢迎光临", "欢光临", [("", "欢"), ("del", "迎"), ("", "光临")]),
        ("two\n  lines", "two lines", [("", "two lines")]),  # white space counts once
        ("gone", "", [("del", "gone")]),
        ("a", "A", [("del", "a"), ("ins", "A")]),
    ],
)
def test_differences_are_marked_by_character(wanted, read, parts):
    assert marked_differences(wanted, read) == parts


def test_either_text_comes_back_from_its_marks(rng):
    """Whatever is drawn: what is not inserted is the wanted text, what is not deleted the one that was read."""
    for _ in range(50):
        wanted, read = ("".join(rng.choice(list("ab cİ"), rng.integers(0, 30))) for _ in range(2))
        parts = marked_differences(wanted, read)
        for other, text in (("ins", wanted), ("del", read)):
            assert "".join(part for mark, part in parts if mark != other) == " ".join(text.split())
    assert marked_differences("STRASSE", "strasse", fold_case=True) == [("", "strasse")]


def test_where_the_wanted_text_stands():
    assert wanted_text({"text": ["Grand", "Opening"], "language": "en"}) == "Grand Opening"
    assert wanted_text({"text_content": "['Open Daily', '9 to 5']"}) == "Open Daily 9 to 5"
    assert wanted_text({"answers": ["J. Doe", "John Doe"]}) == "J. Doe | John Doe" and wanted_text({"label": "yes"}) == "yes"
    assert wanted_text({"answer": "B", "options": {}}) == "B" and wanted_text({"category": "colors"}) == ""


def test_case_counts_as_it_does_for_the_suite(tmp_path):
    """LongText-Bench lower-cases English. What is no text that was read in an image is shown as it is."""
    run = read_eval_run(write_generate_run(tmp_path / "run", items=1, repeats=1))
    item = run.items[0] | {"record": {"read": ["WORD0 Open daily"]}}
    card = lambda item: item_card(run, item, {}, run.path)["texts"][0]  # noqa: E731
    assert card(item) == [("", "WORD0 Open daily")]
    assert card(item | {"fields": item["fields"] | {"language": "zh"}})[:2] == [("del", "word"), ("ins", "WORD")]
    assert card(item | {"answer": "Yes", "fields": {"label": "yes"}, "record": {}}) == "Yes"
    lost = {"record": {}, "score": None, "verdicts": ["not scored"], "replies": [[{"unreadable": "it was cut off"}]]}
    assert card(item | lost) == "could not be read: it was cut off"


def test_boxes_are_in_percent_of_the_image():
    found = {"cup": [{"box": [10, 20, 60, 70], "score": 0.5, "color": "red"}], "dog": [{"box": [0, 0, 200, 100], "score": 0.91}]}
    cup, dog = detected_boxes([found], Thumbnail("", 200, 100))
    assert cup == {"label": "cup 0.50 red", "style": "left:5.00%;top:20.00%;width:25.00%;height:50.00%", "colour": 1}
    assert dog == {"label": "dog 0.91", "style": "left:0.00%;top:0.00%;width:100.00%;height:100.00%", "colour": 2}
    assert detected_boxes(["a text", None, {"unreadable": "no JSON"}], Thumbnail("", 200, 100)) == []


def test_every_image_of_a_page_has_its_own_boxes(tmp_path):
    run = write_generate_run(tmp_path / "run", items=2, repeats=2, size=(50, 100), suite="geneval")
    lines = [json.loads(line) for line in (run / "items.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        line["fields"] = {"category": "counting"}
        line["replies"] = [[{"cup": [{"box": [0, 0, 50, 10 * (2 * n + r)], "score": 1.0}] * (r + n)}] for r in range(2)]
    (run / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(run).read_text()
    assert re.findall(r'class="box c1" style="left:0.00%;top:0.00%;width:50.00%;height:(\d+).00%"', page) == ["20", "40", "60", "60"]
    read = read_eval_run(run)
    grid = dataclasses.replace(read, items=[read.items[1] | {"images": read.items[1]["images"][:1]}])  # two tiles of 100 x 50 pixels
    card = item_card(grid, grid.items[0], embed(image_order([grid], [0])), run)
    assert [len(image["boxes"]) for image in card["images"]] == [1, 2] and "Boxes are what the detector found" in page


def test_a_long_text_is_cut_in_its_marked_parts():
    parts = [("", "x" * 100), ("ins", "word " * 40), ("", "y" * 100)]
    head, rest = head_and_rest(parts)
    assert "".join(t for _, t in head + rest) == "".join(t for _, t in parts) and head[-1][0] == rest[0][0] == "ins"
    assert HEAD - 5 <= sum(len(t) for _, t in head) <= HEAD and head[-1][1].endswith(" ")
    assert head_and_rest("short") == ([("", "short")], [])
