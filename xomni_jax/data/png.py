"""PNG files that say how their image was made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: Image.Image, prompt: str = "", settings: Mapping[str, Any] | None = None) -> bytes:
    """An image as PNG, with its prompt and its settings (JSON) in the text chunks "prompt" and "xomni"."""
    info, file = PngInfo(), io.BytesIO()
    if settings is not None:
        info.add_itxt("prompt", prompt)
        info.add_itxt("xomni", json.dumps(settings, ensure_ascii=False))
    image.save(file, "png", pnginfo=info)
    return file.getvalue()
