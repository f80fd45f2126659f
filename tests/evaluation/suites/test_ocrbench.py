"""OCRBench against the official numbers, and its file."""

import json

import pytest
from PIL import Image

from tests.evaluation.suites.worked import EXAMPLES, PUBLISHED, as_records, needs_published
from xomni_jax.evaluation.suite import SuiteError, check_images
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.evaluation.suites.ocrbench import is_right


@pytest.mark.parametrize("example", EXAMPLES["ocrbench"])
def test_worked(example):
    answers = example["answers"] if isinstance(example["answers"], list) else [example["answers"]]
    assert is_right(example["dataset"], answers, example["prediction"]) == bool(example["score"])


def test_half_width_is_a_switch():
    assert not is_right("svt", ["１２"], "12") and is_right("svt", ["１２"], "12", half_width=True)


def entry(**changes):
    return {
        "dataset_name": "svt", "id": 5, "image_path": "svt/1.png", "question": "what?", "answers": "HOTEL", "type": "Regular"
    } | changes  # fmt: skip


def test_points_and_images(tmp_path):
    entries = [entry(), entry(id=6, answers=["[ \\pi", "b"]), entry(dataset_name="ct80")]
    (tmp_path / "OCRBench.json").write_text(json.dumps(entries, indent=1))
    suite = get_suite("ocrbench")
    items = suite.load(tmp_path)
    assert [i.id for i in items] == ["svt-00005", "svt-00006", "ct80-00005"]
    result = suite.aggregate(as_records(suite, items, [["Hotel"], ["nothing"], ["the hotel"]]))
    assert result["scores"] == {"points": 2, "accuracy": 2 / 3} and result["categories"]["Regular"]["items"] == 3
    with pytest.raises(SuiteError, match=r"3 of 3 images are missing; the first is .*svt/1.png \(get it with OCRBench"):
        check_images(items)
    with pytest.raises(SuiteError, match="svt/1.png .* is missing"):
        items[0].image()
    (tmp_path / "svt").mkdir()
    Image.new("L", (9, 5), 7).save(tmp_path / "svt" / "1.png")
    assert items[0].image().size == (9, 5) and items[0].image().mode == "RGB"
    check_images(items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([entry(), entry()]), "json.1.: the id 'svt-00005' was used before"),
        (json.dumps([entry(answers=[""])]), "json.0.: the field 'answers' holds an empty answer"),
        ("[\n{,}]", "is no list in JSON .*line 2"),
        (json.dumps([entry(answers=None)]), "json.0.: the field 'answers' is missing"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "OCRBench.json").write_text(text)
    with pytest.raises(SuiteError, match=message):
        get_suite("ocrbench").load(tmp_path)


@needs_published
def test_published_questions():
    items = get_suite("ocrbench").load(PUBLISHED)
    assert len(items) == 1000 == len({i.id for i in items})
    assert sum(i.fields["dataset"] == "HME100k" for i in items) == 100
