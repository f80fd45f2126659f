"""Rendered examples: deterministic, disjoint splits, labels and answers that agree with the pixels, readable by real OCR."""

import json

import numpy as np
import pytest

from tests.miniature import ROOT
from xomni_jax.core.config import ConfigError
from xomni_jax.data import glyphs, rendered, words
from xomni_jax.data.rendered import RenderedConfig, render_example, render_sign
from xomni_jax.training.stage import load_config

CONFIG = RenderedConfig()
HELDOUT = RenderedConfig(split="heldout")
PLAIN = dict(shapes=0.0, pseudo_words=0.0, other_faces=0.0)


@pytest.fixture(scope="module")
def train():
    return [render_example(5, i, CONFIG) for i in range(5000)]


@pytest.fixture(scope="module")
def heldout():
    return [render_example(5, i, HELDOUT) for i in range(1000)]


def _drawn(examples, kind):
    return [e for e in examples if e["kind"] == kind]


def test_deterministic_and_different():
    a, b, c = render_example(3, 11, CONFIG), render_example(3, 11, CONFIG), render_example(3, 12, CONFIG)
    np.testing.assert_array_equal(a["image"], b["image"])
    assert {k: v for k, v in a.items() if k not in ("image", "columns")} == {k: v for k, v in b.items() if k not in ("image", "columns")}
    assert a["id"] == "train-3-11-32x64" and a["id"] != c["id"]
    assert render_example(4, 11, CONFIG)["caption"] != a["caption"]


def test_schema(train):
    assert len({e["id"] for e in train}) == len(train)
    for e in train[:300]:
        height, width, channels = e["image"].shape
        assert e["image"].dtype == np.uint8 and channels == 3 and (height, width) in CONFIG.sizes
        assert e["columns"].dtype == np.int32 and e["columns"].shape == (height // 8, width // 8)
        assert 0 <= e["columns"].min() <= e["columns"].max() < rendered.N_COLUMN_CLASSES
        assert json.loads(json.dumps(e["targets"])) == e["targets"]
        assert e["caption"] and e["question"] and e["answer"]
    sizes = [e["image"].shape[1] for e in train]
    assert abs(np.mean(np.array(sizes) == 128) - 0.4) < 0.03


def test_heldout_is_disjoint(train, heldout):
    held = set(words.words("heldout"))
    text = [e["targets"]["text"][0] for e in _drawn(train, "sign")]
    assert not [t for t in text if words.contains_heldout(t)]
    assert all(set(e["targets"]["text"][0].split(" ")) <= held for e in _drawn(heldout, "sign"))
    combos = [{tuple(s.values()) for e in _drawn(x, "shapes") for s in e["targets"]["shapes"]} for x in (train, heldout)]
    assert combos[0] and combos[1] and not combos[0] & combos[1]
    # Every shape, colour and count is still seen in training: only combinations are new.
    assert [len({c[k] for c in combos[0]}) for k in range(3)] == [len(glyphs.SHAPES), len(rendered.COLOURS), 4]


def test_text_lengths(train):
    limits = dict(zip(CONFIG.sizes, CONFIG.text_lengths, strict=True))
    for e in _drawn(train, "sign"):
        low, high = limits[e["image"].shape[:2]]
        assert low <= len(e["targets"]["text"][0]) <= high
        assert e["targets"]["text"][0] in e["caption"] and e["targets"]["background"] in e["caption"]


def test_sign_labels_agree_with_pixels():
    """Each labelled column is the glyph of its class, bit for bit in shape; every other cell is bare ground."""
    config = RenderedConfig(**PLAIN)
    for i in range(200):
        e = render_example(1, i, config)
        ground = e["image"][_bare_pixel(e["columns"])].astype(float)
        ink = 255.0 if ground @ [0.299, 0.587, 0.114] < 140 else 0.0
        cover = ((e["image"] - ground) / (ink - ground)).mean(-1)
        text = ""
        for y, x in np.argwhere(e["columns"] > 0):
            if y == np.argwhere(e["columns"] > 0)[0, 0]:
                assert e["columns"][y + 1, x] == e["columns"][y, x]
                char = glyphs.LETTERS[e["columns"][y, x] - 1]
                cell = cover[y * 8 : y * 8 + 16, x * 8 : x * 8 + 8]
                np.testing.assert_allclose(cell, glyphs.letter(glyphs.FACES[0], char), atol=0.03)
                assert cell[:8].max() > 0.5 and cell[8:].max() > 0.5
                text += char
        assert text == e["targets"]["text"][0].replace(" ", "")
        bare = np.kron(e["columns"] == 0, np.ones((8, 8))) > 0
        assert np.abs(cover[bare]).max() < 0.01


def _bare_pixel(columns):
    y, x = np.argwhere(columns == 0)[0]
    return y * 8 + 4, x * 8 + 4


def test_shapes_count_apart_and_coloured(train):
    import cv2

    for e in _drawn(train, "shapes")[:300]:
        thing = e["targets"]["shapes"][0]
        ground = np.median(e["image"].reshape(-1, 3), axis=0)
        covered = np.abs(e["image"] - ground).max(-1) > 24
        count, _, stats, _ = cv2.connectedComponentsWithStats(covered.astype(np.uint8), connectivity=8)
        assert count - 1 == thing["count"], e["id"]
        assert 9 <= stats[1:, 2:4].min() and stats[1:, 2:4].max() <= 16
        assert np.linalg.norm(ground - rendered.SHAPE_GROUNDS[e["targets"]["background"]]) < 3
        ink = np.median(e["image"][np.abs(e["image"] - ground).max(-1) > 60], axis=0)
        assert min(rendered.COLOURS, key=lambda c: np.linalg.norm(ink - rendered.COLOURS[c])) == thing["colour"]
        first = rendered.shape_class(thing["shape"], thing["colour"])
        assert set(np.unique(e["columns"])) - {0} <= set(range(first, first + 4))


def test_quarters_of_shapes_on_the_grid_stand_together():
    """Every quarter has a cell of its own, also the thin upper ones of a triangle."""
    config, seen = RenderedConfig(shapes=1.0, on_grid=1.0), set()
    for e in (render_example(4, i, config, (32, 64)) for i in range(60)):
        (thing,) = e["targets"]["shapes"]
        first = rendered.shape_class(thing["shape"], thing["colour"])
        corners = np.argwhere(e["columns"] == first)
        assert len(corners) == thing["count"] and (e["columns"] > 0).sum() == 4 * thing["count"]
        for y, x in corners:
            assert e["columns"][y : y + 2, x : x + 2].ravel().tolist() == [first, first + 1, first + 2, first + 3]
        seen.add(thing["shape"])
    assert seen == set(glyphs.SHAPES)


def test_classes_fill_their_range():
    shapes = [rendered.shape_class(s, c) + quarter for s in glyphs.SHAPES for c in rendered.COLOURS for quarter in range(4)]
    classes = [rendered.letter_class(c) for c in glyphs.LETTERS] + shapes
    assert classes == list(range(1, rendered.N_COLUMN_CLASSES)) and rendered.letter_class(" ") == 0


def test_colours_are_easy_to_tell_apart():
    colours = np.array(list(rendered.COLOURS.values()), float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(len(colours), dtype=bool)].min() > 75


def test_questions_and_answers(train):
    answers: dict[str, set] = {}
    for e in train:
        answers.setdefault(e["question"], set()).add(e["answer"])
    assert set(answers) == set(rendered.QUESTIONS)
    assert answers["what colour is the sign?"] == set(rendered.SIGN_GROUNDS)
    assert answers["what colour is the background?"] == set(rendered.SHAPE_GROUNDS)
    assert answers["how many shapes are there?"] == set(rendered.NUMBERS[1:])
    assert answers["which shapes are they?"] == {s + "s" for s in glyphs.SHAPES}


def test_long_text_breaks_into_lines():
    image, columns = render_sign("COFFEE AND TEA", "green", (48, 64))
    lines = ["".join((" " + glyphs.LETTERS)[c] for c in columns[y]).strip() for y in (1, 3)]
    assert lines == ["COFFEE", "AND TEA"] and image.shape == (48, 64, 3)
    assert rendered.wrap("COFFEE AND TEA", 8) == ["COFFEE", "AND TEA"]
    config = RenderedConfig(sizes=((48, 72),), weights=(1,), text_lengths=((9, 20),), shapes=0)
    for i in range(50):
        e = render_example(0, i, config)
        assert (e["columns"] > 0).sum() == 2 * len(e["targets"]["text"][0].replace(" ", ""))


@pytest.mark.parametrize("split", words.SPLITS)
def test_ocr_reads_the_signs(split):
    """PP-OCR on the crop of the ink: at least 97% of clean signs, words and spaces."""
    import cv2
    import rapidocr

    engine = rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.text_score": 0.0,
            "Global.log_level": "critical",
            "Rec.rec_img_shape": [3, 48, 48],
            "Rec.rec_batch_num": 1,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
    )
    config = RenderedConfig(split=split, **PLAIN)
    wrong = []
    for i in range(36):
        e = render_example(2, i, config)
        ground = np.median(np.concatenate([e["image"][0], e["image"][-1], e["image"][:, 0], e["image"][:, -1]]), axis=0)
        y, x = np.nonzero(np.abs(cv2.blur(e["image"].astype(np.float32), (3, 3)) - ground).max(-1) > 60)
        crop = np.ascontiguousarray(e["image"][y.min() : y.max() + 1, x.min() : x.max() + 1, ::-1])
        crop = cv2.copyMakeBorder(crop, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=ground[::-1].tolist())
        read = engine(crop, use_det=False, use_cls=False, use_rec=True).txts[0].strip().upper()
        wrong += [(e["targets"]["text"][0], read)] * (read != e["targets"]["text"][0])
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=(1.0,)), "sizes, weights and text_lengths hold 2, 1 and 2 entries; give one of each per size."),
        (dict(weights=(0.0, 0.0)), "weights=(0.0, 0.0) must be non-negative and not all 0."),
        (dict(sizes=((32, 60), (32, 128))), "size 32x60 must be height x width, multiples of 8 and at least 16 px."),
        (dict(text_lengths=((3, 17), (12, 16))), "text_lengths (3, 17) of size 32x64 must lie within 2 and 16 characters."),
        (dict(shapes=1.5), "shapes=1.5 is a share; give a number from 0 to 1."),
        (
            dict(shape_sizes=((64, 64),)),
            "shapes=0.25 but none of shape_sizes=((64, 64),) is among sizes=((32, 64), (32, 128)); add one.",
        ),
        (dict(shape_sizes=((32, 64), (24, 64))), "shape_sizes holds 24x64; four shapes need at least 32 px on each side."),
        (dict(split="test"), "split='test' is unknown; use one of train, heldout"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError) as error:
        RenderedConfig(**change)
    assert str(error.value) == message


def test_config_from_lists_is_hashable():
    config = RenderedConfig(sizes=[[32, 64]], weights=[1], text_lengths=[[3, 6]], shape_sizes=[[32, 64]])
    assert hash(config) and config.sizes == ((32, 64),)


def test_large_models_learn_from_real_images_unless_told():
    sizes = ((16, 320), (64, 64))
    with pytest.raises(ConfigError, match="a model of 16x320 pixels should .* or set config.data.source=rehearsal to try out"):
        rendered.RenderedSource(RenderedConfig(sizes=sizes, text_lengths=((3, 4),) * 2, shapes=0.0), 0, 2)
    told = rendered.SIGNS.updated({"source": "rehearsal", "sizes": sizes}, "config.data").open(seed=1, batch_size=2)
    examples = [told[n] for n in range(24)]
    assert {e["image"].shape[:2] for e in examples} == set(sizes) and all(e["targets"]["text"] and "columns" not in e for e in examples)


@pytest.mark.parametrize("file", ["tokenizer", "decoder", "pretrain_1", "pretrain_2", "pretrain_3", "sft", "grpo"])
def test_released_sizes_are_trained_on_files_and_rehearsed_on_signs(file):
    """One key changes the source and leaves the sizes, which the programs depend on."""
    config, rehearsal = (load_config(ROOT / "configs" / "xomni" / f"{file}.py", more) for more in ([], ["data.source=rehearsal"]))
    assert config.data.source != "rendered" and config.data.options.path.startswith("data/xomni/")
    with pytest.raises(ConfigError, match=config.data.options.path):
        config.data.open(seed=0, batch_size=2)
    assert rehearsal.data.sizes == config.data.sizes
    assert rehearsal.data.open(seed=0, batch_size=2)[0]["image"].shape[:2] in config.data.sizes
