"""The suites on the embedded data set: perfect images get perfect scores from the real judges, blank ones none."""

import pytest
from PIL import Image

from tests.evaluation.suites.worked import as_records
from xomni_jax.data.rendered import RenderedConfig, render_example
from xomni_jax.data.words import is_heldout_shape
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.suites import get_suite, rendered


def perfect(suite, share):
    """The images that the prompts describe, as a faultless model would draw them."""
    config = RenderedConfig(
        split="heldout", sizes=(rendered.SIZE,), weights=(1.0,), text_lengths=((3, 8),), shapes=share, shape_sizes=(rendered.SIZE,)
    )
    drawn = {f"{n:04d}": render_example(rendered._SEED, n, config) for n in range(8)}
    items = suite.load(None)[:8]
    assert [i.prompt for i in items] == [drawn[i.id]["caption"] for i in items]
    return items, [Image.fromarray(drawn[i.id]["image"]) for i in items]


@pytest.mark.parametrize(("name", "share", "least"), [("rendered-text", 0.0, 0.9), ("rendered-shapes", 1.0, 0.9)])
def test_real_judges_on_perfect_and_blank_images(tmp_path, name, share, least):
    suite, judge = get_suite(name), open_judge(get_suite(name).judge)
    items, images = perfect(suite, share)
    assert images[0].size == (suite.size[1], suite.size[0])
    blank = Image.new("RGB", images[0].size, (200, 30, 30))
    outputs = []
    for item, image in zip(items, images):
        suite.save(tmp_path, item, [image, blank, image, blank])
        outputs.append(judge.ask(suite.open(tmp_path, item), [suite.questions(item)] * 4))
    judge.close()
    result = suite.aggregate(as_records(suite, items, outputs))
    assert least / 2 <= result["scores"][result["headline"]] <= 0.5  # half of the images are blank
    assert sum(c["items"] for c in result["categories"].values()) == 8


def test_prompts_are_held_out_and_sized():
    suite = get_suite("rendered-shapes")
    clauses = [i.fields["metadata"]["include"][0] for i in suite.load(None)]
    assert all(is_heldout_shape(c["class"], c["color"], c["count"]) for c in clauses) and suite.size == (32, 64)


def test_answers_are_compared_but_for_case():
    suite = get_suite("rendered-qa")
    items = suite.load(None)
    assert len(items) == 96 == suite.published and items[0].image().size == (64, 32)
    answers = [[i.fields["answer"].lower() + " "] for i in items[:3]] + [["nonsense"]]
    result = suite.aggregate(as_records(suite, items[:4], answers))
    assert result["scores"] == {"exact match": 0.75}
