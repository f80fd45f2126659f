"""The OCR reward: PP-OCR reads the image, the text is compared with the one the prompt asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from xomni_jax.rewards.services.base import ServiceError, need
from xomni_jax.rewards.services.crop import text_lines
from xomni_jax.rewards.text_metrics import FORMULAS, is_exact, text_score

MODES = ("auto", "crop", "detect")
SECOND = ("tesseract",)
_SIGN_HEIGHT = 64  # an image no higher than this is taken for a sign with a flat ground


class PPOCRReader:
    """PP-OCR (small) through rapidocr, with settings for small images: page defaults take 300 ms, these 10 to 30.

    crop    the recogniser alone on every line of ink: flat grounds. Reads single letters and 8-pixel glyphs.
    detect  detection, then recognition of every line: any ground. Falls back to the crop when no box is found.
    auto    crop up to 64 pixels of height, detect above.
    """

    def __init__(self, mode: str = "auto"):
        if mode not in MODES:
            raise ServiceError(f"OCR mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
        self.mode = mode
        rapidocr = need("rapidocr", "ocr")
        engine = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        self._engine = rapidocr.RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Global.log_level": "critical",
                "Det.limit_side_len": 96,
                "Rec.rec_img_shape": [3, 48, 48],  # no padding of short words to 320 columns
                "Rec.rec_batch_num": 1,
                **{f"EngineConfig.onnxruntime.{k}": v for k, v in engine.items()},
            }
        )

    def read(self, image: np.ndarray) -> str:
        """uint8 [Y, X, 3] -> recognised text, lines joined by spaces, "" when there is none."""
        if self.mode == "detect" or (self.mode == "auto" and image.shape[0] > _SIGN_HEIGHT):
            found = self._engine(np.ascontiguousarray(image[..., ::-1]), use_det=True, use_cls=False, use_rec=True)
            if found.txts:
                return " ".join(found.txts)
        return " ".join(filter(None, (self._read_line(line) for line in text_lines(image))))

    def _read_line(self, line: np.ndarray) -> str:
        found = self._engine(np.ascontiguousarray(line[..., ::-1]), use_det=False, use_cls=False, use_rec=True)
        return " ".join(found.txts or ()).strip()


class OCRScorer:
    """Score of the recognised text by `formula`; with a second reader the lower score counts, against glyphs only one can read.

    Applies to items with a "text" target. An image without text is read as "" and scored: that 0 is real, not a failure.
    Detail: text (what PP-OCR read), exact (right but for case and spaces), no_text; with a second reader second_text and
    second_score.
    """

    name = "ocr"

    def __init__(self, mode: str = "auto", formula: str = "auto", second: str | None = None):
        if formula not in FORMULAS:
            raise ServiceError(f"OCR formula {formula!r} is unknown; choose one of {', '.join(FORMULAS)}")
        if second is not None and second not in SECOND:
            raise ServiceError(f"second reader {second!r} is unknown; choose {' or '.join(SECOND)}")
        self.formula = formula
        self.reader = PPOCRReader(mode)
        self.second = need("xomni_jax.rewards.services.tesseract", "ocr").TesseractReader() if second else None
        self.version = f"pp-ocr-small/{mode}/{formula}" + (f"/min-{second}" if second else "")

    def score(self, image: np.ndarray, item: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
        """See Scorer. ValueError when the text target is not a string or a list of strings with letters in them."""
        wanted = item["targets"].get("text")
        if not wanted:
            return None, {}
        text = self.reader.read(image)
        score = text_score(wanted, text, self.formula)
        detail: dict[str, Any] = {"text": text, "exact": is_exact(wanted, text), "no_text": not text.strip()}
        if self.second is not None:
            detail["second_text"] = self.second.read(image)
            detail["second_score"] = text_score(wanted, detail["second_text"], self.formula)
            score = min(score, detail["second_score"])
        return score, detail
