"""OneIG-Bench's text scores and alignment against the official functions' numbers, and its files."""

import pytest
from PIL import Image

from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.evaluation.suites import get_suite, oneig_text


def item(content, id="000"):
    return Item(id, "p", {"category": "poster design", "text_content": content})


def result(items, language="en", switches=()):
    suite = get_suite(f"oneig-text-{language}", switches)
    rows = [item(content, id) for id, content, _ in items]
    return suite.aggregate(as_records(suite, rows, [[[r] for r in (read or [None] * 4)] for _, _, read in items]))


@pytest.mark.parametrize("example", EXAMPLES["oneig_text_image"])
def test_one_image(example):
    assert oneig_text.normalise(example["text_content"]) == example["gt_norm"]
    assert oneig_text.normalise(oneig_text.clean(example["judge_output"])) == example["ocr_norm"]
    record = get_suite("oneig-text-en").score(item(example["text_content"]), [[example["judge_output"]]])
    assert [record[k] for k in ("edits", "exact", "match", "gt")] == [example[k] for k in ("ED", "CR", "match", "gt_count")]
    assert record["score"] == example["WAC"] and oneig_text.max_tokens(example["text_content"]) == example["max_new_tokens"]


@pytest.mark.parametrize(("language", "key"), [("en", "EN"), ("zh", "ZH_constant_50_on_same_items")])
def test_the_composite_is_computed_once(language, key):
    example = EXAMPLES["oneig_text_corpus"]
    assert result(example["items"], language)["scores"] == example[key]


def test_a_prompt_of_black_images():
    example = EXAMPLES["oneig_text_all_black_prompt"]
    items = example["items_empty_list_means_all_tiles_black"]
    found = result(items)
    assert found["scores"] == example["EN"]
    assert found["notes"] == ["All images of 001 are black; as officially, it is scored with the texts of the prompt before it."]
    fixed = result(items, switches=["leave-out-black"])
    assert fixed["scores"]["text score"] == 1.0 and fixed["notes"] == ["All images of 001 are black; it is left out."]
    first = result([items[1], items[2]])  # officially an error
    assert first["scores"]["text score"] == 1.0 and "001 are black; it is left out" in first["notes"][0]
    with pytest.raises(SuiteError, match="nothing to score"):
        result([items[1]])


def test_one_black_image_takes_no_part():
    record = get_suite("oneig-text-en").score(item("['Hot Tea']"), [["Hot Tea"], [None], ["Hot"], [None]])
    assert (record["images"], record["match"], record["gt"], record["black"]) == (2, 3, 4, 2)
    assert record["read"] == ["Hot Tea", "", "Hot", ""] and record["verdicts"][1] == "black image, left out"


def tables(folder, prompts, texts):
    (folder / "OneIG-Bench.csv").write_text("category,id,prompt_en,type,prompt_length,class\n" + prompts, encoding="utf-8")
    (folder / "text_content.csv").write_text(",id,prompt_en,text_content\n" + texts, encoding="utf-8")


PROMPT = 'Text_Rendering,000,"a ""sign""",NP,short,poster design\n'


def test_loads_lists_in_cells(tmp_path):
    other = "Portrait,000,a face,NP,short,None\n"
    tables(tmp_path, other + PROMPT, '0,000,"a ""sign""","[\'Open Daily\', ""it\'s""]"\n')
    suite = get_suite("oneig-text-en")
    (found,) = suite.load(tmp_path)
    assert (found.id, found.prompt) == ("000", 'a "sign"') and oneig_text.normalise(found.fields["text_content"]) == "Open Daily its"
    assert suite.questions(found)[0] | {"instruction": ""} == {"instruction": "", "max_tokens": 128, "black": "skip", "format": "JPEG"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("0,000,p,['a'\n", "text_content.csv row 1: the field 'text_content' is not the text of a list"),
        ("0,001,p,['a']\n", "row 1: the id '001' is not among"),
        ("0,000,p,['!']\n", "holds nothing that is counted"),
        ("0,000,p\n", "row 1: it has 3 fields, the header has 4"),
        ("0,000,p,['a']\n1,000,p,['b']\n", "row 2: the id '000' was used before"),
        ("0,000,p,\"['a']\n", "text_content.csv line 2: unexpected end of data"),
    ],
)
def test_bad_tables(tmp_path, texts, message):
    tables(tmp_path, PROMPT, texts)
    with pytest.raises(SuiteError, match=message):
        get_suite("oneig-text-en").load(tmp_path)


def test_the_grid(tmp_path):
    suite = get_suite("oneig-text-en")
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)]
    suite.save(tmp_path, item("['x']"), [Image.new("RGB", (32, 16), c) for c in colours])
    with Image.open(tmp_path / "000.webp") as whole:
        assert whole.size == (64, 32) and whole.format == "WEBP"
    tiles = suite.open(tmp_path, item("['x']"))
    assert [t.size for t in tiles] == [(32, 16)] * 4
    assert [t.getcolors() for t in tiles] == [[(512, c)] for c in colours]  # black stays black, or it would be scored


@needs_published
@pytest.mark.parametrize(("name", "long"), [("oneig-text-en", 10), ("oneig-text-zh", 0)])
def test_published_prompts(name, long):
    suite = get_suite(name)
    items = suite.load(PUBLISHED)
    assert len(items) == 200 and [i.id for i in items] == [f"{n:03d}" for n in range(200)]
    assert sum(suite.questions(i)[0]["max_tokens"] == 256 for i in items) == long
