"""The colour and shape scorer on images drawn by hand and by the renderer."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.rewards.images import sign
from xomni_jax.data.rendered import COLOURS, RenderedConfig, render_example
from xomni_jax.rewards.services.shapes import PALETTE, DrawnShape, ShapesScorer, background_share, compare, nearest_names


@pytest.fixture(scope="module")
def scorer():
    return ShapesScorer()


def score(scorer, image, **targets):
    outcome = scorer.score_image(image, {"prompt": "", "targets": targets})
    return outcome.value, outcome.detail


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow", "purple", "orange"])
def test_ground_of_a_sign(scorer, colour):
    """Right colour about 1 whatever the ink covers, every other colour about 0."""
    image = sign("GARDENS", ground=COLOURS[colour])
    value, detail = score(scorer, image, background=colour)
    assert value > 0.97 and detail["background"] == colour and detail["colour_exact"]
    for other in COLOURS.keys() - {colour}:
        assert score(scorer, image, background=other)[0] < 0.02


def test_ground_score_is_dense():
    """A ground wrong in a third of its pixels scores two thirds, also when the wrong part touches no border majority."""
    image = np.full((30, 60, 3), COLOURS["red"], np.uint8)
    image[:, :20] = COLOURS["blue"]
    assert background_share(image, "red") == pytest.approx(2 / 3) and background_share(image, "blue") == pytest.approx(1 / 3)
    assert not background_share(np.full((30, 60, 3), 255, np.uint8), "red")


def test_hiding_the_ground_under_ink_does_not_pay():
    image = np.full((32, 64, 3), 255, np.uint8)
    image[:2] = COLOURS["red"]
    image[-2:] = COLOURS["red"]
    assert background_share(image, "red") < 0.6


def drawn(objects, size=(48, 96)):
    image = Image.new("RGB", size[::-1], (245, 245, 245))
    draw = ImageDraw.Draw(image)
    for n, (shape, colour) in enumerate(objects):
        x, y = 4 + 24 * n, 14
        box = (x, y, x + 18, y + 18)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x + 9, y), (x + 18, y + 18), (x, y + 18)], fill=COLOURS[colour])
    return np.asarray(image)


def test_objects_are_found(scorer):
    objects = [("circle", "red"), ("square", "blue"), ("triangle", "green"), ("circle", "purple")]
    assert Counter(scorer.find(drawn(objects))) == Counter(DrawnShape(*o) for o in objects)
    assert scorer.find(np.full((32, 32, 3), 245, np.uint8)) == []


def test_checks_by_hand():
    """Wanted 2 red circles, found 1 red circle and 1 red square and 1 blue circle."""
    found = Counter([DrawnShape("circle", "red"), DrawnShape("square", "red"), DrawnShape("circle", "blue")])
    checks = compare(found, Counter({DrawnShape("circle", "red"): 2}))
    assert checks == pytest.approx({"count": 2 / 3, "shape": 2 / 3, "colour": 2 / 3, "object": 1 / 3})


def test_score_of_a_shapes_prompt(scorer):
    image = drawn([("circle", "red"), ("circle", "red")])
    right = [{"shape": "circle", "colour": "red", "count": 2}]
    value, detail = score(scorer, image, shapes=right, background="white")
    assert value == 1 and detail["exact"] and detail["found"] == ["red circle", "red circle"]
    swapped = drawn([("circle", "blue"), ("square", "red")])
    both = [{"shape": "circle", "colour": "red", "count": 1}, {"shape": "square", "colour": "blue", "count": 1}]
    assert score(scorer, swapped, shapes=both)[0] == 0.75  # counts, shapes and colours right, bound the wrong way


def test_rendered_images_are_judged_right(scorer):
    """The renderer's images score 1 on their own targets and less on another image's."""
    for shapes in (0.0, 1.0):
        config = RenderedConfig(shapes=shapes, sizes=((32, 64),), weights=(1.0,), text_lengths=((3, 8),))
        examples = [render_example(11, n, config) for n in range(40)]
        own = [score(scorer, e["image"], **e["targets"])[0] for e in examples]
        other = [score(scorer, e["image"], **f["targets"])[0] for e, f in zip(examples, examples[1:]) if e["targets"] != f["targets"]]
        assert np.mean(own) > 0.98 and np.mean(other) < 0.75, (np.mean(own), np.mean(other))


def test_does_not_apply_without_its_targets(scorer):
    assert score(scorer, sign("A"), text=["A"]) == (None, {})


@pytest.mark.parametrize(
    "targets, words",
    [
        ({"background": "mauve"}, "colour 'mauve' is not known"),
        ({"shapes": [{"shape": "cube", "colour": "red", "count": 1}]}, "shape 'cube' is not known"),
        ({"shapes": [{"shape": "circle", "colour": "red", "count": 0}]}, "count 0"),
        ({"shapes": "two circles"}, "list of maps"),
    ],
)
def test_bad_targets_are_errors(scorer, targets, words):
    with pytest.raises(ValueError, match=words):
        score(scorer, sign("A"), **targets)


def test_every_palette_colour_is_its_own_nearest():
    assert nearest_names(np.array(list(PALETTE.values()))).tolist() == list(PALETTE)
