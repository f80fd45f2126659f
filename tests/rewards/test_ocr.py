"""The OCR scorer and its readers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.rewards.chinese import SENTENCES
from tests.rewards.images import ocr_item, sign
from xomni_jax.core.config import ConfigError
from xomni_jax.rewards import Score
from xomni_jax.rewards.scorer import ServiceError, build_scorer
from xomni_jax.rewards.services import tesseract
from xomni_jax.rewards.services.crop import background_colour, ink_mask, text_lines
from xomni_jax.rewards.services.ocr import OCRScorer, PPOCRReader

WORDS = ["GARDEN", "SILVER", "TEA", "BRIDGE", "MOON", "CLOUDS"]
GROUNDS = [(205, 40, 40), (40, 150, 70), (45, 80, 205), (135, 60, 170)]


@pytest.fixture(scope="module")
def scorer():
    return OCRScorer()


@pytest.mark.tesseract
def test_both_readers_read_small_words(scorer):
    second = tesseract.TesseractReader()
    images = [sign(w, ground=GROUNDS[n % 4]) for n, w in enumerate(WORDS)]
    assert [scorer.reader.read(p).upper() for p in images] == WORDS
    assert sum(second.read(p).upper() == w for p, w in zip(images, WORDS)) >= len(WORDS) - 1


def test_modes(scorer):
    """Detection reads a large image whose words stand on different grounds; auto chooses it by height."""
    image = Image.fromarray(sign("MORNING", 96, 192, (40, 150, 70), px=26))
    ImageDraw.Draw(image).rectangle((0, 60, 192, 96), fill=(45, 80, 205))
    image.paste(Image.fromarray(sign("LIGHT", 32, 120, (45, 80, 205), px=26)), (40, 62))
    large = np.asarray(image)
    assert PPOCRReader("detect").read(large).upper() == scorer.reader.read(large).upper() == "MORNING LIGHT"
    assert PPOCRReader("crop").read(sign("OPEN", 96, 160, px=32)) == "OPEN"
    assert PPOCRReader("detect").read(np.full((96, 96, 3), 30, np.uint8)) == ""


def test_images_of_full_size_are_read_in_one_pass_of_their_own_scale(scorer, monkeypatch):
    """Detection sees a large image with a long side of 736 pixels and a small one as it is; recognition reads from the whole image."""
    seen, text_det = [], scorer.reader._engine.text_det
    session = text_det.session
    monkeypatch.setattr(text_det, "session", lambda pixels: seen.append(pixels.shape[2:]) or session(pixels))
    large = sign("please mind the step\nopen daily", 1152, 1152, GROUNDS[1], px=40)
    assert scorer.score_image(large, ocr_item("please mind the step open daily")).value == 1
    assert PPOCRReader("detect").read(sign("MOON", 70, 140, px=26)) == scorer.reader.read(sign("MOON", 70, 140, px=26)) == "MOON"
    assert seen == [(736, 736), (64, 128)]


def test_the_paper_name(scorer):
    other = build_scorer("paddle_ocr", {})
    assert (other.name, other.version) == ("paddle_ocr", scorer.version) and other.score_image(sign("TEA"), ocr_item("TEA")).value == 1


def test_several_targets_and_formulas(scorer):
    both = sign("OPEN\nLATE", 40, 64)
    assert scorer.score_image(both, ocr_item("OPEN", "LATE")).value == 1
    assert scorer.score_image(both, ocr_item("LATE", "OVER")).value == pytest.approx((1 + 2 / 4) / 2)
    assert scorer.score_image(both, {"prompt": "", "targets": {"text": "OPEN LATE"}}).value == 1
    assert OCRScorer(formula="substring").score_image(sign("XOPENX"), ocr_item("OPEN")).value == 1


def test_does_not_apply_without_a_text_target(scorer):
    assert scorer.score_image(sign("OPEN"), {"prompt": "", "targets": {}}) == Score(None)
    assert scorer.score_image(sign("OPEN"), {"prompt": "", "targets": {"text": []}}) == Score(None)


def test_no_text_is_a_real_zero(scorer):
    score = scorer.score_image(np.full((32, 64, 3), 77, np.uint8), ocr_item("OPEN"))
    assert score.value == 0 and score.detail["no_text"] and not scorer.score_image(sign("OPEN"), ocr_item("CAFE")).detail["no_text"]


@pytest.mark.tesseract
def test_lower_of_two_readers_counts():
    """An image only one reader can read pays no more than the other one gives."""
    scorer = OCRScorer(second="tesseract")
    score = scorer.score_image(sign("SILVER"), ocr_item("SILVER"))
    assert score.value == 1 and score.detail["second_text"].upper() == "SILVER"
    scorer.second.read = lambda image: "SILXYZ"
    score = scorer.score_image(sign("SILVER"), ocr_item("SILVER"))
    assert score.value == score.detail["second_score"] == 0.5 and score.detail["text"].upper() == "SILVER"
    scorer.second.read, scorer.reader.read = (lambda image: "SILVER"), (lambda image: "")
    assert scorer.score_image(sign("SILVER"), ocr_item("SILVER")).value == 0


@pytest.mark.tesseract
def test_second_reader_that_fails_is_an_error_not_a_zero():
    scorer = OCRScorer(second="tesseract")
    scorer.second.read = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scorer.score_image(sign("SILVER"), ocr_item("SILVER"))


def test_missing_language_data_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(tesseract, "_data_folders", lambda: [tmp_path])
    with pytest.raises(ServiceError, match="no language data eng.traineddata: apt-get install tesseract-ocr-eng"):
        OCRScorer(second="tesseract")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mode": "fast"}, "mode='fast'"),
        ({"formula": "bleu"}, "formula='bleu'"),
        ({"second": "eyes"}, "'eyes'"),
        ({"colour": 1}, "colour: unknown"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        build_scorer("ocr", options)


def test_lines_are_cut_at_wide_gaps_only():
    """Two lines are two crops with four pixels of plain ground around; the dots of small letters stay with their letters."""
    lines = text_lines(sign("OPEN\nLATE", 40, 64))
    assert len(lines) == 2 and len(text_lines(sign("ijij", 32, 64))) == 1
    for line in lines:
        rim = np.concatenate([line[:4].reshape(-1, 3), line[-4:].reshape(-1, 3), line[:, :4].reshape(-1, 3), line[:, -4:].reshape(-1, 3)])
        assert (rim == (205, 40, 40)).all()
        assert ink_mask(line)[4].any() and ink_mask(line)[-5].any() and ink_mask(line)[:, 4].any() and ink_mask(line)[:, -5].any()
    assert text_lines(np.full((16, 24, 3), 9, np.uint8)) == []
    np.testing.assert_array_equal(background_colour(sign("A")), (205, 40, 40))


def test_chinese_at_the_released_size(scorer):
    """A sentence of 33 characters of 36 pixels on 1152 x 1152, as `python -m tests.rewards.chinese` draws it, is read exactly."""
    image = np.asarray(Image.open(Path(__file__).with_name("chinese_1152.png")).convert("RGB"))
    assert scorer.score_image(image, ocr_item(SENTENCES[2])).value == 1.0
    assert scorer.score_image(image, ocr_item(SENTENCES[1])).value < 0.3


def test_ink_that_touches_the_border_and_noise(scorer):
    """No crash and a finite score on what an untrained decoder draws."""
    rng = np.random.default_rng(0)
    for shape in ((32, 64, 3), (8, 8, 3), (1, 1, 3), (5, 300, 3)):
        assert 0 <= scorer.score_image(rng.integers(0, 256, shape, np.uint8), ocr_item("OPEN")).value <= 1
