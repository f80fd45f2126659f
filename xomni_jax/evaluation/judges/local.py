"""Judges that run in this process: PP-OCR for text, contours for drawn shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.evaluation.judges import as_shown, is_skipped


class PPOCRJudge:
    """The reader of the OCR reward. It needs no instruction and no limit of tokens."""

    name = "pp-ocr"

    def __init__(self) -> None:
        from xomni_jax.rewards.services.ocr import PPOCRReader

        self._reader = PPOCRReader()
        self.settings: dict[str, Any] = {"model": "pp-ocr-small", "mode": self._reader.mode, "rapidocr": version("rapidocr")}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is the text that was read, or None for an image that is left out."""
        return [[self._read(p, q) for q in asked] for p, asked in zip(images, questions, strict=True)]

    def close(self) -> None:
        """See Judge."""

    def _read(self, image: Image.Image, question: Mapping[str, Any]) -> str | None:
        return None if is_skipped(image, question) else self._reader.read(np.asarray(as_shown(image, question)))


class ContoursJudge:
    """GenEval's detector for flat images of shapes: contours are the objects, all of them certain."""

    name = "contours"

    def __init__(self) -> None:
        from xomni_jax.rewards.services.shapes import ShapesScorer

        self._scorer = ShapesScorer()
        self.settings: dict[str, Any] = {"version": self._scorer.version}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is {class: [{"box", "score", "color"}]}."""
        return [[self._detect(p, q) for q in asked] for p, asked in zip(images, questions, strict=True)]

    def close(self) -> None:
        """See Judge."""

    def _detect(self, image: Image.Image, question: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in question["classes"]}
        for kind, box in self._scorer.locate(np.asarray(image.convert("RGB"))):
            if kind.shape in found:
                found[kind.shape].append({"box": list(box), "score": 1.0, "color": kind.colour})
        return found
