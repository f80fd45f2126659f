"""PNG files, written fast, that may say how their image was made."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from isal import isal_zlib
from PIL import Image


def png_bytes(image: Image.Image | np.ndarray, prompt: str = "", settings: Mapping[str, Any] | None = None) -> bytes:
    """An image as PNG, with its prompt and its settings (JSON) in the text chunks "prompt" and "xomni" if there are settings.

    Every row is stored as its difference to the one above and compressed by Intel's ISA-L: a tenth of the time that zlib takes for flat
    images, less than half for photographs.

    Args:
      image: uint8 [Y, X, 3], or an image of any mode, which is written as RGB.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    height, width, _ = pixels.shape
    rows = np.full((height, 1 + 3 * width), 2, np.uint8)  # a row begins with its filter; 2 is the difference to the row above
    rows[0, 1:], rows[1:, 1:] = pixels[0].ravel(), (pixels[1:] - pixels[:-1]).reshape(height - 1, 3 * width)
    chunks = [_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))]  # 8 bits a channel, RGB
    if settings is not None:
        chunks += [_text("prompt", prompt), _text("xomni", json.dumps(settings, ensure_ascii=False))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, _chunk(b"IDAT", isal_zlib.compress(rows, 1)), _chunk(b"IEND", b"")])


def _text(keyword: str, text: str) -> bytes:
    """An iTXt chunk: not compressed, in no particular language."""
    return _chunk(b"iTXt", keyword.encode() + bytes(5) + text.encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
