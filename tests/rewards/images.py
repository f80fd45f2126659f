"""Images the reward tests judge, drawn with Pillow alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


def sign(text: str, height: int = 32, width: int = 64, ground: tuple[int, int, int] = (205, 40, 40), px: float = 13.3) -> np.ndarray:
    """White text in the middle of a coloured ground; newlines part the lines. uint8 [height, width, 3]."""
    image = Image.new("RGB", (width, height), ground)
    font = ImageFont.truetype(str(_FONT), px)
    ImageDraw.Draw(image).multiline_text((width / 2, height / 2), text, fill=(255, 255, 255), font=font, anchor="mm", align="center")
    return np.asarray(image).copy()


def ocr_item(*text: str) -> dict:
    """An item that asks for text."""
    return {"prompt": "a sign", "targets": {"text": list(text)}}
