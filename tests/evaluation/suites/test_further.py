"""MMMU, WISE, OneIG-Bench's dimensions and T2I-CompBench: numbers of the official functions, and their files."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from tests.evaluation.suites.published import png, write_parquet
from tests.evaluation.suites.worked import as_records
from tests.rewards.fake_service import fake_service
from xomni_jax.cli.main import main
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.judges.measure import REPLIES, fits
from xomni_jax.evaluation.suite import Item, JudgeUnavailable, SuiteError
from xomni_jax.evaluation.suites import get_suite, letters, mmmu, t2i_rules

# ---- MMMU

OPTIONS = {"A": "red cat", "B": "Cat", "C": "dog, big", "D": "$9"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(B)", "B"),
        ("B.", "B"),
        ("Either (A) or (C), I take (A)", "A"),  # the one that stands last
        ("A or C", "C"),
        ("(D) rather than A", "D"),  # brackets before bare letters
        ("'B'", "B"),
        ("It must surely be a red cat there", "B"),  # "cat" stands after "red cat" begins
        ("I think that it costs $9 today", "D"),
        ("red cat", None),  # texts count in longer replies only
        ("none of these can be seen here at all", None),
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(reply, letter):
    assert letters.mmmu(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answers", "reply", "right"),
    [
        (["24/7"], "The answer is 24/7.", True),
        (["3.429"], "so x = 3.43", True),  # two decimals
        (["1,234"], "It is 1234.00", True),
        (["-5"], "therefore the result is 5", False),
        (["1e3"], "1000", True),
        (["x"], "the answer is x y", True),
        (["x"], "box", False),  # a single letter needs a space beside it
        (["red", "blue"], "Blue", True),
        (["red"], "not bored", True),  # a text counts wherever it stands
        (["8"], "first 8\nthe answer is 9", False),  # a key phrase in one line leaves the others out
        (["8"], "I see 8 cats", True),
        (["12"], "12,34", False),
    ],
)
def test_mmmu_short_answers(answers, reply, right):
    assert mmmu.is_right(answers, reply) is right


def mmmu_rows():
    row = {"question": "What is <image 1>?", "answer": "B", "question_type": "multiple-choice", "options": "['a', 'b, c', \"it's\"]"}
    return [
        row | {"id": "validation_Art_Theory_1", "image_1": png((250, 0, 0)), "image_2": png((0, 0, 250))},
        row
        | {
            "id": "validation_Art_Theory_2",
            "answer": "['7', 'seven']",
            "options": "[]",
            "question_type": "open",
            "image_1": png((0, 9, 0)),
        },
    ]


def test_mmmu_files(tmp_path):
    for subject in ("Art_Theory", "Math"):
        rows = [row | {"id": row["id"].replace("Art_Theory", subject), "image_2": png((1, 1, 1))} for row in mmmu_rows()]
        write_parquet(tmp_path / "MMMU" / subject / "validation-00000-of-00001.parquet", rows)
    suite = get_suite("mmmu")
    items = suite.load(tmp_path)
    assert [i.id for i in items[:2]] == ["validation_Art_Theory_1", "validation_Art_Theory_2"] and len(items) == 4
    assert items[0].prompt.startswith("What is <image 1>?\n(A) a\n(B) b, c\n(C) it's\n") and items[0].image().getpixel((0, 0)) == (
        250,
        0,
        0,
    )
    assert items[1].prompt == "What is <image 1>?\nAnswer the question using a single word or phrase." and "(A)" not in items[1].prompt
    result = suite.aggregate(as_records(suite, items, [["(B)"], ["Seven"], ["dunno"], ["it is 8"]]))
    assert result["scores"] == {"accuracy": 0.5, "Art and Design": 1.0, "Science": 0.0}
    assert result["categories"]["Math"] == {"score": 0.0, "items": 2}
    assert result["notes"] == ["1 replies of 1 items could not be read and count as wrong: validation_Math_1."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "test_Art_1"}, "names none of the 30 subjects"),
        ({"answer": "?"}, "'?', which is none of A, B, C"),
        ({"question_type": "essay"}, "'essay', not multiple-choice or open"),
        ({"options": "['a', ['b']]"}, "holds ['b'], which is list"),
        ({"image_1": "x"}, "'image_1' is no image"),
    ],
)
def test_mmmu_bad_rows(change, words, tmp_path):
    write_parquet(tmp_path / "Art" / "validation-0.parquet", [mmmu_rows()[0] | change])
    with pytest.raises(SuiteError) as refusal:
        get_suite("mmmu").load(tmp_path)
    assert words in str(refusal.value) and "validation-0.parquet row 0: the field" in str(refusal.value)


# ---- WISE


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency**: 1 **Realism** 2\n**aesthetic quality**:2", (1, 2, 2)),
        ("2\n1\n0", (2, 1, 0)),
        ("2\n 1 \n0\n2", (2, 1, 0)),
        ("Consistency: 0, on reflection Consistency: 2\nRealism: 1\nAesthetic Quality: 1", (2, 1, 1)),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 2\n2\n1\n0", None),
        ("Consistency: 5\nRealism: 1\nAesthetic Quality: 1", None),
        ("two, one, zero", None),
    ],
)
def test_wise_grades(reply, grades):
    suite = get_suite("wise")
    record = suite.score(Item("1", "p", {}), [[reply]])
    assert record["unparsed"] == (grades is None)
    if grades:
        assert record["score"] == pytest.approx((0.7 * grades[0] + 0.2 * grades[1] + 0.1 * grades[2]) / 2)


@pytest.mark.parametrize(
    ("reply", "score"), [("Score: 1", 1), ("**score** 0.", 0), ("0", 0), ("1\n0", None), ("Score: 10", None), ("yes", None)]
)
def test_wise_verified_grades(reply, score):
    record = get_suite("wise-verified").score(Item("1", "p", {}), [[reply]])
    assert (record["unparsed"], record["score"]) == ((1, 0.0) if score is None else (0, score))


def write_wise(folder, suffix, numbers):
    names = [f"{name}{suffix}.json" for name in ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")]
    rows = [{"Prompt": f"p{n}", "Explanation": "e", "Category": "C", "Subcategory": "S", "prompt_id": n} for n in numbers]
    for k, name in enumerate(names):
        (folder / name).write_text(json.dumps(rows[2 * k : 2 * k + 2]))


def test_wise_weights_its_categories(tmp_path):
    write_wise(tmp_path, "", [400, 567, 568, 701, 801, 901])
    suite = get_suite("wise")
    items = suite.load(tmp_path)
    assert [i.fields["category"] for i in items] == ["culture", "time", "space", "biology", "physics", "chemistry"]
    assert "p400" in suite.questions(items[0])[0]["instruction"] and suite.file(items[0]) == "400.png"
    graded = [[[f"Consistency: {n}\nRealism: {n}\nAesthetic Quality: {n}"]] for n in (2, 2, 1, 1, 0, 0)]
    result = suite.aggregate(as_records(suite, items, graded))
    assert result["scores"]["WiScore"] == pytest.approx(0.4 + 0.167 + 0.133 / 2 + 0.1 / 2)
    graded[-1] = [["?"]]
    result = suite.aggregate(as_records(suite, items, graded))
    assert result["scores"]["WiScore"] == pytest.approx((0.4 + 0.167 + 0.133 / 2 + 0.1 / 2) / 0.9)
    assert result["notes"] == [
        "901 is left out: its grades could not be read.",
        "Without chemistry: the overall score is of the other categories.",
    ]
    write_wise(tmp_path, "_verified", [400, 520, 521, 641, 761, 1001])
    with pytest.raises(SuiteError, match="natural_science_verified.json.1.: the field 'prompt_id' is 1001, not 1 to 1000"):
        get_suite("wise-verified").load(tmp_path)


def test_wise_through_the_command(tmp_path, capsys):
    """Images of another program, judged by a chat model over HTTP."""
    write_wise(tmp_path, "_verified", [1, 2, 521, 641, 761, 881])
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    for n in (1, 2):
        Image.new("RGB", (8, 8)).save(out / "images" / f"{n}.png")
    with fake_endpoint("say Score: 1", "say Score: 0") as endpoint:
        judge = ["--judge", f"tiny-vlm@{endpoint.url}"]
        assert main(["eval", "wise-verified", "--data", str(tmp_path), "--out", str(out), "--phase", "score", "--limit", "2", *judge]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["headline"]["name"], results["headline"]["value"]) == ("WiScore", 0.5) and results["judge"]["name"] == "tiny-vlm"
    assert "official judge" not in results["judge"]["settings"]  # that of DPG-Bench is not this suite's


# ---- OneIG-Bench


def write_oneig(folder, language="en"):
    names = ("Anime_Stylization", "Portrait", "General_Object", "Text_Rendering", "Knowledge_Reasoning")
    prompt = "prompt_en" if language == "en" else "prompt_cn"
    rows = [f"{category},{n:03d},a {category} {n}" for category in names for n in range(2)]
    (folder / ("OneIG-Bench.csv" if language == "en" else "OneIG-Bench-ZH.csv")).write_text(
        f"category,id,{prompt}\n" + "\n".join(rows) + "\n"
    )
    asked = {"question": '{"1": "Boys?", "2": "Four?", "3": "Tall?"}', "dependency": '{"1": [0], "2": [1], "3": [2]}'}
    for name in ("anime", "human", "object"):
        suffix = "" if language == "en" else "_zh"
        (folder / f"{name}{suffix}.json").write_text(json.dumps({"000": asked, "001": asked}))
    (folder / "gt_answer.json").write_text(json.dumps({"000": "five peaks", "001": "a basin"}))
    (folder / "style.csv").write_text(",id,class\n0,000,\n1,001,Pixel Art\n")


def test_alignment_looks_at_the_parents_own_answers(tmp_path):
    write_oneig(tmp_path)
    suite = get_suite("oneig-alignment-en")
    items = suite.load(tmp_path)
    assert [i.id for i in items] == ["anime-000", "anime-001", "human-000", "human-001", "object-000", "object-001"]
    assert suite.file(items[0]) == "anime/000.webp" and len(suite.questions(items[0])) == 3
    record = suite.score(items[0], [["yes", "no", "yes"], ["no", "yes", "yes"], [None] * 3, [None] * 3])
    assert record["score"] == 1 / 3 and record["verdicts"][0] == "0.333, 2 of 4 images are black"
    outputs = [[["yes"] * 3] * 4, [[None] * 3] * 4, *[[["no", "maybe", "no"]] * 4] * 4]
    result = suite.aggregate(as_records(suite, items, outputs))
    assert result["scores"] == {"alignment": 0.2} and result["categories"]["anime"] == {"score": 1.0, "items": 1}
    assert (
        result["notes"][0] == "anime-001 is left out: too many of its images are black." and "16 replies of 4 items" in result["notes"][1]
    )


def test_reasoning_style_and_diversity(tmp_path):
    write_oneig(tmp_path)
    reasoning, style, diversity = (get_suite(f"oneig-{name}-en") for name in ("reasoning", "style", "diversity"))
    (first, second), (styled,), drawn = reasoning.load(tmp_path), style.load(tmp_path), diversity.load(tmp_path)
    assert reasoning.questions(first)[0]["prompt"] == "five peaks" and second.prompt == "a Knowledge_Reasoning 1"
    assert reasoning.score(first, [[0.2], [0.4], [None], [0.6]])["score"] == pytest.approx(0.4)
    assert style.questions(styled)[0] == {"measure": "style", "prompt": "pixel_art", "black": "skip", "format": "JPEG"}
    assert style.score(styled, [[[0.5, -0.2]], [[0.4, 0.2]]])["score"] == pytest.approx((0.25 + 0.3) / 2)
    assert len(drawn) == 10
    apart = diversity.score(drawn[0], [[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]], [None]])
    assert apart["score"] == pytest.approx(2 / 3) and apart["counted"] == 1
    assert diversity.score(drawn[0], [[[1.0, 0.0]], [None], [None], [None]])["counted"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "{"}, "'question' is not an object with numbers"),
        ({"question": '{"1": 5}'}, "'question' holds 5, not a text"),
        ({"question": '{"2": "Q?"}'}, "not numbered from 1"),
        ({"dependency": '{"1": [7]}'}, "a dependency has no question"),
        ({"dependency": '{"1": [true]}'}, "holds [True], not a list of numbers"),
        ({"dependency": [1]}, "'dependency' is list"),
    ],
)
def test_bad_questions_of_alignment(change, words, tmp_path):
    write_oneig(tmp_path, "zh")
    asked = {"question": '{"1": "Boys?"}', "dependency": '{"1": [0]}'}
    (tmp_path / "anime_zh.json").write_text(json.dumps({"000": asked, "001": asked | change}))
    with pytest.raises(SuiteError) as refusal:
        get_suite("oneig-alignment-zh").load(tmp_path)
    assert words in str(refusal.value) and "anime_zh.json entry '001'" in str(refusal.value)


def test_a_question_without_a_prompt(tmp_path):
    write_oneig(tmp_path)
    (tmp_path / "gt_answer.json").write_text(json.dumps({"009": "x"}))
    with pytest.raises(SuiteError, match="gt_answer.json entry '009': there is no prompt '009' of reasoning"):
        get_suite("oneig-reasoning-en").load(tmp_path)


# ---- T2I-CompBench


class Doc(list):
    """A parsed prompt: words with their part of speech after a slash; noun phrases in brackets, as spaCy would find them."""

    def __init__(self, text):
        words = text.replace("[", "").replace("]", "").split()
        super().__init__(SimpleNamespace(text=word.split("/")[0], pos_=(word.split("/") + [""])[1]) for word in words)
        spans = [part.split("]")[0] for part in text.split("[")[1:]]
        self.noun_chunks = [SimpleNamespace(text=" ".join(w.split("/")[0] for w in span.split())) for span in spans]


def test_what_is_taken_from_a_prompt():
    doc = Doc("[a green/ADJ bench/NOUN] and [a blue/ADJ bowl/NOUN] on [top]")
    found = t2i_rules.read_prompt("a green bench and a blue bowl on top", doc, ["yes", "objects"], complex=False)
    assert found["phrases"] == ["a green bench", "a blue bowl"] and found["nouns"] == ["bench", "bowl"]
    doc = Doc("The red/ADJ hat/NOUN was on top of the brown/ADJ coat/NOUN rack/NOUN .")
    found = t2i_rules.read_prompt("The red hat was on top of the brown coat rack.", doc, ["objects"], complex=True)
    assert found == {"phrases": [], "locality": "on top of", "nouns": ["hat", "coat"], "text": "The hat was on top of the coat rack ."}
    assert t2i_rules.objects_around(Doc("Rex/PROPN sat next to Old/PROPN Tom/PROPN today/ADV")) == ["Rex", "Tom"]
    assert t2i_rules.objects_around(Doc("a cat/NOUN near a dog/NOUN near a cow/NOUN")) == []


BOX = [0, 0, 100, 100]


@pytest.mark.parametrize(
    ("locality", "other", "value"),
    [
        ("on the left of", [200, 10, 300, 110], 1.0),
        ("on the right of", [200, 10, 300, 110], 0.0),
        ("on the left of", [60, 0, 160, 100], 0.4),  # overlap 0.25
        ("on the top of", [10, 200, 110, 300], 1.0),
        ("on the bottom of", [10, 200, 110, 300], 0.0),
        ("on the top of", [200, 200, 300, 300], 0.0),  # neither axis is the greater
        ("next to", [500, 100, 600, 200], 1.0),  # near on one axis is enough
        ("near", [300, 500, 400, 600], 0.3),
        ("on top of", [10, 200, 110, 300], 0.0),  # has no rule
    ],
)
def test_positions(locality, other, value):
    assert t2i_rules.position(locality, BOX, other) == pytest.approx(value)


def test_objects_must_both_be_found_and_sure_enough():
    dog = {"name": "dog", "score": 0.8, "box": BOX}
    boy, girl = ({"name": name, "score": 0.6, "box": [200, 0, 300, 100]} for name in ("person", "girl"))
    assert t2i_rules.placed("on the left of", ["dog", "boy"], [dog, boy]) == pytest.approx(0.2 + 0.15 + 0.5)
    assert t2i_rules.placed("on the left of", ["dog", "girl"], [dog, girl]) == 0.0  # the detector says person
    assert t2i_rules.placed("on the right of", ["dog", "boy"], [dog, boy]) == 0.0  # below one half
    assert t2i_rules.placed("near", ["dog", "dog"], [dog]) == pytest.approx(0.9)
    assert t2i_rules.placed("near", [], [dog]) == t2i_rules.placed("near", ["dog", "cat"], [dog]) == 0.0


def test_complex_prompts_are_measured_by_what_they_hold(tmp_path, monkeypatch):
    prompts = {
        "A red/ADJ [hat/NOUN] near a [cat/NOUN] .": 0,
        "A [man/NOUN] runs/VERB .": 1,
        "A [dog/NOUN] eats/VERB near a [bowl/NOUN] .": 2,
    }
    docs = {" ".join(token.text for token in Doc(text)).replace(" .", "."): Doc(text) for text in prompts}
    names = list(docs)
    (tmp_path / "complex_val.txt").write_bytes("\r\n".join(names).encode() + b"\r\n")
    (tmp_path / "complex_val_spatial.txt").write_text(names[0].upper() + "\n")
    (tmp_path / "complex_val_action.txt").write_text(names[1] + "\n")
    monkeypatch.setattr(t2i_rules, "language", lambda: docs.__getitem__)
    suite = get_suite("t2i-compbench-complex")
    items = suite.load(tmp_path)
    assert [i.fields["category"] for i in items] == ["spatial", "action", "complex"]
    assert [[q["measure"] for q in suite.questions(i)] for i in items] == [
        ["yes", "yes", "objects"],
        ["yes", "similarity"],
        ["yes", "yes", "objects", "similarity"],
    ]
    near = [{"name": "dog", "score": 1.0, "box": BOX}, {"name": "bowl", "score": 1.0, "box": BOX}]
    outputs = [[[0.5, 0.5, []]] * 10, [[0.33333, 0.3]] * 10, [[1.0, 0.5, near, 0.25]] * 10]
    records = as_records(suite, items, outputs)
    assert [r["score"] for r in records] == pytest.approx([0.125, (0.3333 + 0.3) / 2, (0.5 + 1.0 + 0.25) / 3])
    assert suite.aggregate(records)["scores"]["score"] == pytest.approx(sum(r["score"] for r in records) / 3)
    suite.save(tmp_path, items[1], [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(10)])
    assert (tmp_path / "samples" / "A man runs._000010.png").is_file()
    assert [image.getpixel((0, 0))[0] for image in suite.open(tmp_path, items[1])] == list(range(10))


def test_prompts_that_cannot_name_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i_rules, "language", lambda: Doc)
    (tmp_path / "color_val.txt").write_text("a cat\n../../a dog\n")
    with pytest.raises(SuiteError, match=r"color_val.txt:2: the id '../../a dog' cannot be part of a file name"):
        get_suite("t2i-compbench-color").load(tmp_path)


# ---- the judge


def test_a_scoring_service_measures():
    image, black = Image.new("RGB", (8, 8), (9, 9, 9)), Image.new("RGB", (8, 8))
    question = {"measure": "yes", "prompt": "a cat?", "black": "skip", "format": "JPEG"}
    with fake_service("ok", scorer="blip") as service:
        judge = open_judge("measure", f"blip@{service.url}")
        ((first,), (second,)) = judge.ask([image, black], [[question], [question]])
        assert first == pytest.approx(0x89 / 100) and second is None  # the service's score is the first byte of the PNG it was sent
        with pytest.raises(
            JudgeUnavailable, match="blip did not judge an image: it was asked for 'objects' and must give \"objects\", a list"
        ):
            judge.ask([image], [[{"measure": "objects", "prompt": ""}]])
        judge.close()
        with pytest.raises(JudgeUnavailable, match="serves 'blip', not 'clip'"):
            open_judge("measure", f"clip@{service.url}")
    with pytest.raises(SuiteError, match="a judge of kind 'measure' is needed and no --judge was given; it can be NAME@URL"):
        open_judge("measure")


def test_replies_of_a_scoring_service_are_checked():
    sound = {"name": "cat", "score": 0.5, "box": [1, 2, 3, 4]}
    wrong = [None, "0.5", True, math.nan, {}, [None], [math.inf, 1.0], [[1.0, 2.0]], [sound | {"box": [1, 2]}], [sound | {"score": "high"}]]
    assert fits("objects", [sound]) and fits("objects", []) and fits("style", [0.1, 0.2]) and fits("embedding", [1.0]) and fits("yes", 0.5)
    for kind in REPLIES:
        for reply in wrong:
            assert not fits(kind, reply), (kind, reply)


def test_without_spacy_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spacy", None)
    t2i_rules.language.cache_clear()
    (tmp_path / "color_val.txt").write_text("a cat\n")
    assert main(["eval", "t2i-compbench-color", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install 'xomni_jax[compbench]', then python -m spacy download en_core_web_sm" in told
    assert not (tmp_path / "out").exists()
