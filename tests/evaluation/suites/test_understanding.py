"""POPE, GQA, MMBench, SEED-Bench and DocVQA against the official functions' numbers, and their files in each published form."""

import json

import pytest

from tests.evaluation.suites.published import png, write_parquet, write_tsv
from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.core.registry import RegistryError
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.evaluation.suites import get_suite, letters, pope, short_answers

RED, BLUE = (250, 0, 0), (0, 0, 250)


def first_pixel(item):
    return item.image().getpixel((0, 0))


# ---- POPE


@pytest.mark.parametrize("example", EXAMPLES["pope_parse"])
def test_pope_readings(example):
    assert pope.official(example["answer"]) == example["official"]
    assert pope.vlmevalkit(example["answer"]) == example["vlmevalkit"].lower()
    assert (pope.lmms_eval(example["answer"]) in ("yes", "no")) == example["lmms_eval_counts_as_answer"]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("N.o", "no"),  # full stops go, and nothing takes their place
        ("No.It is", "unknown"),
        ("**Yes**", "unknown"),  # other signs than those it lists belong to the word
        ("Yes: there is a cat", "unknown"),
        ("Answer:yes", "unknown"),
        ("'yes'|no", "unknown"),
        ("Yes/perhaps", "yes"),  # a space takes the place of a sign,
        ("Yes/perhaps / maybe", "unknown"),  # but not where the reply has the sign next to a space
        ("yes,1,000", "unknown"),  # or a comma between digits anywhere
        ("no 3.5", "no"),
        ("." * 32 + "no", "no"),
        ("." * 33 + "no", "unknown"),  # a flag that stands where the count belongs
        ("[YES]", "yes"),
    ],
)
def test_pope_as_vlmevalkit_reads_it(answer, read):
    """As the official functions read the same answers."""
    assert pope.vlmevalkit(answer) == read


def test_an_undecided_answer_is_wrong_and_a_miss_for_vlmevalkit():
    suite = get_suite("pope")
    items = [Item(f"random-{n}", "?", {"category": "random", "label": label}) for n, label in enumerate(["yes", "yes", "no", "no"])]
    records = as_records(suite, items, [["Yes"], ["**Yes**"], ["No"], ["Perhaps"]])
    found = pope.metrics(records, "VLMEvalKit")
    assert (found["precision"], found["recall"], found["accuracy"]) == (1.0, 0.5, 0.5)
    assert pope.metrics(records, "lmms-eval")["recall"] == 1.0  # it leaves the undecided one out


def test_pope_metrics():
    example = EXAMPLES["pope_aggregate"]
    suite = get_suite("pope")
    items = [Item(f"random-{n:05d}", "?", {"category": "random", "label": label}) for n, (_, label) in enumerate(example["pairs"])]
    records = as_records(suite, items, [[answer] for answer, _ in example["pairs"]])
    for reader, key, names in (
        ("official", "official", {"F1": "f1", "accuracy": "acc"}),
        ("lmms-eval", "lmms_eval", {"F1": "f1", "accuracy": "accuracy"}),
    ):
        found, wanted = pope.metrics(records, reader), example[key]
        for name in ("F1", "accuracy", "precision", "recall", "yes ratio"):
            assert found[name] == wanted[names.get(name, name.replace(" ", "_"))], (reader, name)
    assert [sum(r["counts"]["official"][k] for r in records) for k in range(4)] == [4, 1, 3, 2]
    result = suite.aggregate(records)
    assert result["headline"] == "mean F1" and result["scores"]["mean F1"] == example["official"]["f1"]
    assert result["notes"] == ["Without popular, adversarial: the mean is over random."]


def test_pope_means_over_splits_and_says_what_is_undefined():
    suite = get_suite("pope")
    items = [Item(f"{s}-{n}", "?", {"category": s, "label": "yes" if n else "no"}) for s in pope.SPLITS for n in (0, 1)]
    answers = {"random": ("no", "yes"), "popular": ("yes", "yes"), "adversarial": ("no", "no")}
    result = suite.aggregate(as_records(suite, items, [[answers[i.fields["category"]][int(i.id[-1])]] for i in items]))
    assert result["scores"]["mean F1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result["scores"]["mean accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result["notes"] == ["The official scorer divides by 0 in adversarial: nothing was right or asked with yes."]


def write_pope(folder, **changes):
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"}
    for split in pope.SPLITS:
        (folder / f"coco_pope_{split}.json").write_text(json.dumps(row) + "\n" + json.dumps(row | {"question_id": 2} | changes) + "\n")


def test_pope_files(tmp_path):
    write_pope(tmp_path)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").write_bytes(png(RED))
    items = get_suite("pope").load(tmp_path)
    assert [i.id for i in items][:3] == ["random-00001", "random-00002", "popular-00001"] and first_pixel(items[0]) == RED
    asked = get_suite("pope", ["single-word"]).load(tmp_path)[0].prompt
    assert asked == items[0].prompt + "\nAnswer the question using a single word or phrase."
    write_pope(tmp_path, label="maybe")
    with pytest.raises(SuiteError, match=r"coco_pope_random.json:2: the field 'label' is 'maybe'"):
        get_suite("pope").load(tmp_path)


@needs_published
def test_pope_published_questions():
    items = get_suite("pope").load(PUBLISHED)
    assert len(items) == 9000 and sum(i.fields["label"] == "yes" for i in items) == 4500


# ---- GQA


@pytest.mark.parametrize("example", EXAMPLES["gqa_exact_match"])
def test_gqa_matches(example):
    assert float(short_answers.equal(example["gold"], example["prediction"])) == example["score"]


def test_gqa_parquet(tmp_path):
    images = [{"id": "n1", "image": png(RED)}, {"id": "n2", "image": png(BLUE)}, {"id": "n3", "image": png(RED)}]
    write_parquet(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    question = {"question": "Which animal?", "answer": "cat", "imageId": "n2", "types": {"structural": "query"}}
    rows = [{"id": "201"} | question, {"id": "202"} | question | {"imageId": "n3", "types": {"structural": "verify"}}]
    write_parquet(tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    suite = get_suite("gqa")
    items = suite.load(tmp_path)
    assert [first_pixel(i) for i in items] == [BLUE, RED] and items[0].prompt.startswith("Which animal?\nAnswer the question using")
    result = suite.aggregate(as_records(suite, items, [["Cat."], [" cat "]]))
    assert result["scores"] == {"exact match": 1.0, "exact match (VLMEvalKit)": 0.5} and set(result["categories"]) == {"query", "verify"}
    write_parquet(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images[:2])
    with pytest.raises(SuiteError, match="row 1: the image 'n3' is not in testdev_balanced_images"):
        suite.load(tmp_path)


def test_gqa_tsv_with_a_shared_image(tmp_path):
    rows = [{"index": 1, "question": "q", "answer": "a", "image": png(BLUE)}, {"index": 2, "question": "q", "answer": "b", "image": "1"}]
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", rows)
    assert [first_pixel(i) for i in get_suite("gqa").load(tmp_path)] == [BLUE, BLUE]
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", [rows[0], rows[1] | {"image": "9"}])
    with pytest.raises(SuiteError, match="row 2: the image is neither base64 nor the index of a row"):
        get_suite("gqa").load(tmp_path)


def test_broken_images_and_files_are_named(tmp_path):
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", [{"index": 1, "question": "q", "answer": "a", "image": "x!" * 50}])
    with pytest.raises(SuiteError, match="GQA_TestDev_Balanced.tsv row 1: the image is not base64"):
        get_suite("gqa").load(tmp_path)[0].image()
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", [{"index": 1, "question": "q", "answer": "a", "image": "abcd" * 50}])
    with pytest.raises(SuiteError, match="row 1: the image cannot be read"):
        get_suite("gqa").load(tmp_path)[0].image()
    (tmp_path / "DocVQA").mkdir()
    (tmp_path / "DocVQA" / "validation-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SuiteError, match="validation-00000.parquet is no whole parquet file"):
        get_suite("docvqa").load(tmp_path)


# ---- MMBench and SEED-Bench


@pytest.mark.parametrize("example", EXAMPLES["mcq_extraction"], ids=lambda e: e["prediction"])
def test_letters(example):
    assert (letters.lmms_eval(example["prediction"], example["choices"]) or False) == example["lmms_eval"]
    assert (letters.vlmevalkit(example["prediction"], example["choices"]) or False) == example["vlmevalkit"]


def test_letters_beyond_the_examples():
    options = {"A": "red", "B": "blue"}
    assert letters.vlmevalkit("B it is, I am quite sure of that", options) is None  # not among the last four words
    assert letters.lmms_eval("There is A cat here", options) is None  # an article
    assert letters.lmms_eval("There is A cat, so B.", options) == "B"
    long = "It seems to me that the answer must be red"
    assert (letters.vlmevalkit(long, options), letters.lmms_eval(long, options)) == (None, "A")


SCENE = {"A": "a red car", "B": "two dogs", "C": "a cat", "D": "nothing"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("the correct answer is d", "D"),
        ("The answer is C because it is the only animal that can be seen here", "C"),
        ("The correct answer is **B**. Here's why: the dogs stand in front of the car", "B"),
        ("ANSWER  IS a, I am sure, whatever the others may say about it", "A"),
        ("The answer is Better left open, since nobody knows what it might be", "B"),  # the sentence need not end after the letter
        ("The answer is E because there are five of them, as everyone can see", None),
        ("Sorry, I can't help with images of people yet. The answer is B", "Z"),
        ("I'm sorry, but without the image provided I cannot say", "Z"),
        ("Cannot determine the answer", "Z"),
        ("I can't process this file. B", "Z"),
        ("Z", "Z"),
        ("Z or A", "A"),
        ("A or B, and the answer is C", "C"),
        ("Failed to obtain answer via API, the answer is B", None),
        ("Failed to obtain answer via API: two dogs", "B"),
    ],
)
def test_letters_as_vlmevalkit_decides(reply, letter):
    """As the official functions decide the same replies."""
    assert letters.vlmevalkit(reply, SCENE) == letter


def test_a_refusal_is_wrong_and_not_undecided():
    item = Item("1", "?", {"answer": "B", "options": SCENE})
    record = get_suite("mmbench").score(item, ["I can't process this file."])
    assert (record["right"], record["unparsed"], record["verdicts"]) == (0, 0, ["read as Z, wanted B"])


def mmbench_rows():
    base = {"question": "What?", "hint": "nan", "A": "cat", "B": "dog", "C": "", "D": "", "answer": "A"}
    base |= {"category": "x", "l2-category": "y"}
    turned = {"A": "dog", "B": "cat", "answer": "B"}
    return [
        {"index": 7} | base | {"image": png(RED)},
        {"index": 1_000_007} | base | turned | {"image": "7"},
        {"index": 8} | base | {"hint": "look left", "category": "z", "image": png(BLUE)},
    ]


def test_mmbench_is_circular(tmp_path):
    write_tsv(tmp_path / "MMBench_DEV_EN_V11.tsv", mmbench_rows())
    suite = get_suite("mmbench")
    items = suite.load(tmp_path)
    assert [i.id for i in items] == ["7", "1000007", "8"] and [first_pixel(i) for i in items] == [RED, RED, BLUE]
    assert items[2].prompt.startswith("Hint: look left\nQuestion: What?\nOptions:\nA. cat\nB. dog\n") and "C." not in items[2].prompt
    assert items[0].prompt.startswith("Question: What?")
    result = suite.aggregate(as_records(suite, items, [["A"], ["A"], ["A."]]))
    assert result["scores"]["circular accuracy"] == 0.5 and result["scores"]["accuracy of single rotations"] == 2 / 3
    assert result["categories"] == {"x": {"score": 0.0, "items": 1}, "z": {"score": 1.0, "items": 1}}
    assert suite.aggregate(as_records(suite, items, [["A"], ["cat"], ["A or B"]]))["scores"] == {
        "circular accuracy": 0.5,
        "accuracy of single rotations": 2 / 3,
        "undecided": 1,
        "l2: y": 0.5,
    }
    notes = suite.aggregate(as_records(suite, items, [["A"], ["cat"], ["A or B"]]))["notes"]
    assert notes == ["1 replies of 1 items could not be read and count as wrong: 8."]


def test_mmbench_in_chinese(tmp_path):
    rows = [r | {"question": "图中有什么？", "A": "猫", "B": "狗", "answer": "B", "hint": ""} for r in mmbench_rows()[::2]]
    write_tsv(tmp_path / "MMBench_DEV_CN_V11.tsv", rows)
    write_tsv(tmp_path / "MMBench_DEV_EN_V11.tsv", mmbench_rows())
    suite = get_suite("mmbench-cn")
    items = suite.load(tmp_path)
    assert suite.title == "MMBench CN" and items[0].prompt.startswith("Question: 图中有什么？\nOptions:\nA. 猫\nB. 狗\n")
    result = suite.aggregate(as_records(suite, items, [["答案是 B"], ["狗"]]))
    assert result["scores"]["circular accuracy"] == 1.0
    assert suite.aggregate(as_records(suite, items, [["答案是B"], ["猫狗"]]))["scores"]["undecided"] == 2


def test_mmbench_parquet_with_the_other_toolkit(tmp_path):
    rows = [r | {"image": png(RED)} for r in mmbench_rows()]
    write_parquet(tmp_path / "en" / "dev-00000-of-00001.parquet", rows)
    suite = get_suite("mmbench", ["lmms-eval"])
    items = suite.load(tmp_path)
    assert items[2].prompt.startswith("look left What? There are several options:\nA. cat\nB. dog\n\n")
    assert suite.score(items[0], ["There is A cat: (A)."])["right"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "row 1: the field 'answer' is '', which is no option; the answers of test splits are not public"),
        ({"B": "nan"}, "row 1: a question needs two options, it has 1"),
        ({"index": "x"}, "row 1: the field 'index' is 'x'"),
    ],
)
def test_mmbench_bad_rows(tmp_path, change, message):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [mmbench_rows()[0] | change])
    with pytest.raises(SuiteError, match=message):
        get_suite("mmbench").load(tmp_path)


def test_two_versions_of_mmbench_are_not_mixed(tmp_path):
    for version in ("", "_V11"):
        write_tsv(tmp_path / f"MMBench_DEV_EN{version}.tsv", mmbench_rows())
    with pytest.raises(SuiteError, match="leave only the version to be measured"):
        get_suite("mmbench").load(tmp_path)


@pytest.mark.parametrize("example", EXAMPLES["seed_first_character"], ids=lambda e: e["prediction"])
def test_seed_first_character(example):
    assert letters.first_character(example["prediction"]) == example["pred_used"]
    item = Item("1", "?", {"answer": "B", "options": {"A": "x", "B": "y"}})
    assert get_suite("seedbench").score(item, [example["prediction"]])["score"] == example["correct_if_B"]


def test_seedbench_keeps_images_only(tmp_path):
    base = {"question": "What?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "b", "question_type_id": 3}
    rows = [
        base | {"question_id": "101_0", "data_type": "image", "image": [png(RED)]},
        base | {"question_id": "102_0", "data_type": "video", "image": [png(BLUE), png(RED)]},
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", rows[1:])
    write_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", rows[:1])
    suite = get_suite("seedbench")
    (item,) = suite.load(tmp_path)
    assert item.id == "101_0" and first_pixel(item) == RED and item.prompt.startswith("What?\nA. 1\nB. 2\nC. 3\nD. 4\n")
    assert suite.aggregate(as_records(suite, [item], [["(B)"]]))["scores"] == {"accuracy": 0.0}
    (tmp_path / "data" / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(SuiteError, match="holds 1 of the 2 files like test-00001-of-00002.parquet; download the others too"):
        suite.load(tmp_path)
    other = get_suite("seedbench", ["vlmevalkit"])
    assert other.aggregate(as_records(other, [item], [["(B)"]]))["scores"] == {"accuracy": 1.0}


# ---- DocVQA


@pytest.mark.parametrize("example", EXAMPLES["docvqa_anls"])
def test_anls(example):
    assert short_answers.anls(example["answers"], example["prediction"]) == example["anls"]


def test_docvqa_parquet_and_tsv(tmp_path):
    row = {"questionId": "11", "question": "Which year?", "answers": ["1987", "87"], "image": png(RED)}
    row |= {"question_types": ["form", "layout"]}
    write_parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", [row, row | {"questionId": "12"}])
    suite = get_suite("docvqa")
    items = suite.load(tmp_path)
    result = suite.aggregate(as_records(suite, items, [["1987 "], ["1988"]]))
    assert result["scores"]["ANLS"] == 0.875 and result["categories"]["layout"] == {"score": 0.875, "items": 2}
    tsv = tmp_path / "tsv"
    tsv.mkdir()
    write_tsv(tsv / "DocVQA_VAL.tsv", [{"index": 3, "question": "q", "answer": "['a, b', \"it's\"]", "image": png(BLUE)}])
    (item,) = suite.load(tsv)
    assert item.fields["answers"] == ["a, b", "it's"] and first_pixel(item) == BLUE


def test_docvqa_without_answers(tmp_path):
    row = {"questionId": "11", "question": "Which year?", "answers": None, "image": png(RED)}
    write_parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", [row])
    with pytest.raises(SuiteError, match="row 0: there are no answers; those of the test split are not public"):
        get_suite("docvqa").load(tmp_path)


# ---- choosing


def test_names_switches_and_instructions_are_checked():
    with pytest.raises(RegistryError, match="the suite 'nope' is unknown; use one of longtext-en"):
        get_suite("nope")
    with pytest.raises(SuiteError, match="pope has no switch 'x'; it has single-word"):
        get_suite("pope", ["x"])
    with pytest.raises(SuiteError, match="there is no instruction 'x'"):
        get_suite("pope", instructions={"x": "y"})
