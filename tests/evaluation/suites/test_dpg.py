"""DPG-Bench against the official functions' numbers, and its files."""

import csv

import pytest
from PIL import Image

from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.evaluation.suites.dpg import read_questions

EXAMPLE = EXAMPLES["dpg"]
COLUMNS = "item_id text keywords proposition_id dependency category_broad category_detailed tuple question_natural_language".split()


def write(folder, rows, prompts):
    (folder / "prompts").mkdir()
    for id in prompts:
        (folder / "prompts" / f"{id}.txt").write_text(f"a boat, {id}\n")
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def rows_of(questions=EXAMPLE["questions"]):
    return [
        {"item_id": q["item_id"], "proposition_id": q["proposition_id"], "dependency": q["dependency"], "tuple": q["tuple"]}
        | {"question_natural_language": q["question"], "text": "t"}
        for q in questions
    ]


FIRST = {"item_id": "0", "proposition_id": 1, "dependency": "0", "tuple": "entity - whole (sky)", "question": "Is there a sky?"}


def replies(id="demo"):
    return [[tile[str(p)] for p in range(1, 6)] for tile in EXAMPLE["answers"][id]]


def run(folder, switches=(), outputs=None):
    suite = get_suite("dpg", switches)
    items = {i.id: i for i in suite.load(folder)}
    outputs = outputs or {"demo": replies(), "0": [["yes"]] * 4}
    return suite.aggregate(as_records(suite, list(items.values()), [outputs[id] for id in items]))


def test_worked(tmp_path):
    write(tmp_path, rows_of([FIRST, FIRST | {"proposition_id": 2}]) + rows_of(), ["0", "demo"])
    suite = get_suite("dpg")
    demo = next(i for i in suite.load(tmp_path) if i.id == "demo")
    record = suite.score(demo, replies())
    assert record["score"] == EXAMPLE["result"]["per_image"]["demo"]["mean"]
    assert [v.split(" of ")[0] for v in record["verdicts"]] == [f"{c * 5:.0f}" for c in EXAMPLE["result"]["per_image"]["demo"]["crops"]]
    result = suite.aggregate([record | {"id": "demo", "fields": demo.fields}])
    assert result["scores"]["score"] == EXAMPLE["result"]["score"]
    assert {k: v["score"] for k, v in result["categories"].items()} == EXAMPLE["result"]["L1"]
    assert {k: result["scores"][k] for k in EXAMPLE["result"]["L2"]} == EXAMPLE["result"]["L2"]
    assert result["scores"]["entity (all tiles)"] == 75.0  # six of eight
    fixed = get_suite("dpg", ["all-tiles"]).aggregate([record | {"id": "demo", "fields": demo.fields}])
    assert fixed["categories"]["entity"]["score"] == 75.0 and fixed["scores"]["entity (last tile)"] == 100.0


def test_the_first_row_is_skipped_and_its_item_dropped(tmp_path):
    write(tmp_path, rows_of(), ["demo"])
    assert EXAMPLE["same_csv_with_no_row_before_it"]["failed"] == ["demo.png"]
    with pytest.raises(SuiteError, match="use the switch keep-first-row"):
        run(tmp_path)
    result = run(tmp_path, ["keep-first-row"])
    assert result["scores"]["score"] == EXAMPLE["result"]["score"] and result["notes"] == []


def test_without_dependents_the_first_item_only_loses_a_question(tmp_path):
    write(tmp_path, rows_of([FIRST, FIRST | {"proposition_id": 2}]) + rows_of(), ["0", "demo"])
    outputs = {"demo": replies(), "0": [["no", "yes"]] * 4}
    result = run(tmp_path, outputs=outputs)
    assert result["scores"]["score"] == 75.0 and result["notes"] == []
    assert run(tmp_path, ["keep-first-row"], outputs)["scores"]["score"] == 50.0


def test_a_dropped_item_is_named(tmp_path):
    write(tmp_path, rows_of([FIRST, FIRST | {"proposition_id": 2, "dependency": "1"}]) + rows_of(), ["0", "demo"])
    result = run(tmp_path, outputs={"demo": replies(), "0": [["yes", "yes"]] * 4})
    assert result["scores"]["score"] == 50.0 and result["notes"][0].startswith("0 is left out")


def test_only_yes_counts_and_nonsense_is_listed(tmp_path):
    write(tmp_path, rows_of([FIRST, FIRST | {"proposition_id": 2}]) + rows_of(), ["0", "demo"])
    result = run(tmp_path, outputs={"demo": replies(), "0": [["yes", "Yes"], ["yes", "maybe"], ["no", "yes"], ["yes", "no"]]})
    assert result["scores"]["score"] == (25 + 50) / 2
    assert result["notes"] == ["2 replies of 1 items could not be read and count as no: 0."]


def test_prompts_alone_can_be_drawn_but_not_scored(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"item_id": "a1", "prompt": "a boat"}\n')
    suite = get_suite("dpg")
    (item,) = suite.load(tmp_path)
    assert (item.id, item.prompt) == ("a1", "a boat")
    with pytest.raises(SuiteError, match="scoring DPG-Bench needs dpg_bench.csv"):
        suite.questions(item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dependency": "x"}, "row 2: the field 'dependency' is 'x'"),
        ({"proposition_id": "one"}, "row 2: the field 'proposition_id' is 'one', not a whole number"),
        ({"tuple": ""}, "row 2: the field 'tuple' is empty"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    rows = rows_of()
    write(tmp_path, [rows[0], rows[1] | change], ["demo"])
    with pytest.raises(SuiteError, match=message):
        get_suite("dpg").load(tmp_path)


def test_a_prompt_without_questions(tmp_path):
    write(tmp_path, rows_of(), ["demo", "other"])
    with pytest.raises(SuiteError, match="no questions for 1 prompts, the first is 'other'"):
        get_suite("dpg").load(tmp_path)
    (tmp_path / "prompts" / "other.txt").write_text("\n")
    with pytest.raises(SuiteError, match="other.txt holds no rows"):
        get_suite("dpg").load(tmp_path)


def test_an_item_that_comes_again_starts_anew(tmp_path):
    write(tmp_path, rows_of([EXAMPLE["questions"][0], FIRST, EXAMPLE["questions"][2]]), ["0", "demo"])
    assert [q["proposition"] for q in read_questions(tmp_path / "dpg_bench.csv")["demo"]] == [3]


def test_asks_one_question_each_and_tiles_row_by_row(tmp_path):
    write(tmp_path, rows_of([FIRST]) + rows_of(), ["demo"])
    suite = get_suite("dpg", instructions={"yes-no": "Q: {question}"})
    (item,) = suite.load(tmp_path)
    assert [q["instruction"] for q in suite.questions(item)][:2] == ["Q: Is there a boat?", "Q: Is the boat blue?"]
    suite.save(tmp_path, item, [Image.new("RGB", (4, 4), (k * 50, 0, 0)) for k in range(4)])
    with Image.open(tmp_path / "demo.png") as whole:
        assert [whole.getpixel(xy)[0] for xy in ((0, 0), (4, 0), (0, 4), (4, 4))] == [0, 50, 100, 150]
    assert [t.getpixel((0, 0))[0] for t in suite.open(tmp_path, Item("demo", ""))] == [0, 50, 100, 150]


@needs_published
def test_published_prompts():
    items = get_suite("dpg").load(PUBLISHED)
    assert len(items) == 1065 == len({i.id for i in items}) and any(i.id == "partiprompts97" for i in items)
