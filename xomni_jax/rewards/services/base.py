"""What a scorer is, and the table of those that can be served."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

import numpy as np

SCORERS: dict[str, str] = {  # name -> "module:class"; imported only when served
    "ocr": "xomni_jax.rewards.services.ocr:OCRScorer",
    "shapes": "xomni_jax.rewards.services.shapes:ShapesScorer",
    "quality": "xomni_jax.rewards.services.quality:QualityScorer",
    "tesseract": "xomni_jax.rewards.services.tesseract:TesseractScorer",
    "detector": "xomni_jax.rewards.services.detector:DetectorScorer",
}


class ServiceError(ValueError):
    """A scorer or its server cannot start. One sentence with the mend."""


class Scorer(Protocol):
    """Judges one image. `score` returns None when the item is none of its business and raises when it could not judge."""

    name: str
    version: str

    def score(self, image: np.ndarray, item: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
        """uint8 [Y, X, 3] and its item -> (score in [0, 1] or None, JSON-able detail)."""
        ...


def build(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """The scorer `name` with its keyword options. ServiceError when unknown or when it cannot start here."""
    if name not in SCORERS:
        raise ServiceError(f"scorer {name!r} is unknown; choose one of {', '.join(SCORERS)}")
    module, _, cls = SCORERS[name].partition(":")
    return getattr(need(module, name), cls)(**(options or {}))


def need(module: str, scorer: str, extra: str = "rewards") -> ModuleType:
    """Import a module a scorer depends on. ServiceError when its package, part of `extra`, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ServiceError(f"scorer {scorer!r} needs the package {missing!r}: pip install 'xomni_jax[{extra}]'") from error
