"""The judges that run in this process, on images whose content is known."""

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.data import glyphs
from xomni_jax.data.rendered import COLOURS
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suites import get_suite

ASK = {"instruction": "", "max_tokens": 128}


def page(lines, size=(640, 360)):
    """Black text on white, as a slide has it."""
    image = Image.new("RGB", size, "white")
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 30)
    for n, line in enumerate(lines):
        ImageDraw.Draw(image).text((40, 40 + 80 * n), line, fill="black", font=font)
    return image


def test_pp_ocr_scores_a_page_for_both_text_benchmarks():
    lines = ["Fresh coffee every morning", "Locally roasted since 1998", "Open Daily 9 to 5"]
    judge, black = open_judge("ocr"), Image.new("RGB", (640, 360))
    longtext, oneig = get_suite("longtext-en"), get_suite("oneig-text-en")
    first = Item("0000", "p", {"text": lines, "language": "en", "category": "slide", "length": "short"})
    second = Item("000", "p", {"text_content": str(lines), "category": "PPT generation"})
    (plain,), (jpeg,), (nothing,), (dark,) = judge.ask(
        [page(lines), page(lines), Image.new("RGB", (640, 360), "white"), black],
        [longtext.questions(first), oneig.questions(second), longtext.questions(first), oneig.questions(second)],
    )
    assert (nothing, dark) == ("", None)
    record = longtext.score(first, [[plain], [nothing]])
    assert record["match"] >= 12 and record["gt"] == 26  # 13 words, twice
    composite = oneig.score(second, [[jpeg], [dark]])
    assert composite["match"] >= 12 and composite["images"] == 1
    assert judge.settings["model"] == "pp-ocr-small" and judge.settings["official judge"] == "Qwen2.5-VL-7B-Instruct"


def test_contours_give_boxes_and_colours():
    canvas = np.full((32, 64, 3), 245, np.float32)
    for (y, x), colour in (((2, 4), "red"), ((14, 40), "blue")):
        ink = glyphs.shape("square", 14)[..., None]
        canvas[y : y + 14, x : x + 14] += ink * (np.array(COLOURS[colour], np.float32) - 245)
    judge = open_judge("contours")
    ((found,),) = judge.ask([Image.fromarray(canvas.astype(np.uint8))], [[{"classes": ["square", "star"]}]])
    assert found["star"] == [] and {b["color"] for b in found["square"]} == {"red", "blue"}
    red = next(b for b in found["square"] if b["color"] == "red")
    assert np.abs(np.array(red["box"]) - (5, 3, 17, 15)).max() <= 1.0 and red["score"] == 1.0  # inset by a sixteenth
