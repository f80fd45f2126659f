"""Text, read by Tesseract instead of PP-OCR: an independent second opinion (xomni eval effect --second URL)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer, ServiceError, need
from xomni_jax.rewards.services.crop import background_colour, text_lines
from xomni_jax.rewards.text_metrics import compare_text

_SCALE, _BORDER = 2, 8  # measured best for words 10 to 30 pixels high


class TesseractReader:
    """Tesseract through `tesserocr` on every line of ink, enlarged twice, with a border (page segmentation mode 7).

    ServiceError when the package or the language data is missing.
    """

    def __init__(self, language: str = "eng"):
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # its own threads cost more than they bring on small images
        tesserocr = need("tesserocr", "tesseract")
        folder = next((p for p in _data_folders() if (p / f"{language}.traineddata").is_file()), None)
        if folder is None:
            raise ServiceError(
                f"tesseract finds no language data {language}.traineddata: apt-get install tesseract-ocr-{language}, "
                "or set TESSDATA_PREFIX to the folder that holds it"
            )
        self._api = tesserocr.PyTessBaseAPI(path=str(folder), lang=language, psm=tesserocr.PSM.SINGLE_LINE)

    def read(self, image: np.ndarray) -> str:
        """uint8 [Y, X, 3] -> the lines read, joined by spaces, "" when there is nothing to read."""
        background = tuple(int(c) for c in background_colour(image))
        return " ".join(filter(None, (self._read_line(line, background) for line in text_lines(image, pad=0))))

    def _read_line(self, line: np.ndarray, background: tuple[int, ...]) -> str:
        large = Image.fromarray(line).resize((line.shape[1] * _SCALE, line.shape[0] * _SCALE), Image.Resampling.BICUBIC)
        page = Image.new("RGB", (large.width + 2 * _BORDER, large.height + 2 * _BORDER), background)
        page.paste(large, (_BORDER, _BORDER))
        self._api.SetImage(page)
        return self._api.GetUTF8Text().strip()


class TesseractScorer(Scorer):
    """How well the text that Tesseract reads matches targets["text"]; judges images of a policy that was trained against PP-OCR.

    Does not apply to items without that target. The detail of a score is that of `compare_text`.
    """

    name = "tesseract"
    scale = "likeness of the text that was read to the wanted one, 0 to 1"
    range = (0.0, 1.0)
    version = "tesseract-line/auto"

    def __init__(self) -> None:
        super().__init__()
        self.reader = TesseractReader()

    def score_image(self, image: np.ndarray, item: Item) -> Score:
        """See Scorer. ValueError when the text target is not a string or a list of strings with letters in them."""
        wanted = item["targets"].get("text")
        if not wanted:
            return Score(None)
        value, detail = compare_text(wanted, self.reader.read(image))
        return Score(value, None, detail)


def _data_folders() -> list[Path]:
    """Folders where the language data may be: TESSDATA_PREFIX, then where distributions put it."""
    named = [Path(os.environ["TESSDATA_PREFIX"])] if os.environ.get("TESSDATA_PREFIX") else []
    named += [p / "tessdata" for p in named]
    roots = [Path(p) for p in ("/usr/share/tesseract-ocr", "/usr/local/share", "/usr/share", "/opt/homebrew/share")]
    return named + [p for root in roots for p in (*sorted(root.glob("*/tessdata"), reverse=True), root / "tessdata")]
