"""What a scorer is, and the table of those that can be served."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from xomni_jax.core.config import build
from xomni_jax.core.registry import Registry
from xomni_jax.rewards.protocol import Item, Score

SCORERS = Registry(
    "scorer",
    {
        "ocr": "xomni_jax.rewards.services.ocr:OCRScorer",
        "paddle_ocr": "xomni_jax.rewards.services.ocr:PaddleOCRScorer",
        "shapes": "xomni_jax.rewards.services.shapes:ShapesScorer",
        "quality": "xomni_jax.rewards.services.quality:QualityScorer",
        "tesseract": "xomni_jax.rewards.services.tesseract:TesseractScorer",
        "detector": "xomni_jax.rewards.services.detector:DetectorScorer",
        "alignment": "xomni_jax.rewards.services.alignment:AlignmentScorer",
        "unified_reward": "xomni_jax.rewards.services.unified_reward:UnifiedRewardScorer",
        "unified_reward_pairs": "xomni_jax.rewards.services.unified_reward:UnifiedRewardPairsScorer",
        "got_ocr": "xomni_jax.rewards.services.got_ocr:GotOCRScorer",
        "clip": "xomni_jax.rewards.services.clip:CLIPScorer",
        "pickscore": "xomni_jax.rewards.services.pickscore:PickScorer",
        "hpsv2": "xomni_jax.rewards.services.hpsv2:HPSv2Scorer",
        "imagereward": "xomni_jax.rewards.services.imagereward:ImageRewardScorer",
        "hpsv3": "xomni_jax.rewards.services.hpsv3:HPSv3Scorer",
        "loo_fid": "xomni_jax.rewards.services.loo_fid:LooFidScorer",
    },
)


class ServiceError(ValueError):
    """A scorer or its server cannot start. One sentence with the remedy."""


class Unavailable(Exception):
    """What a scorer depends on, such as the endpoint of its model, does not answer for now: the client waits and asks again."""


class Scorer:
    """Base class of scorers: set `name`, and implement `score_image`, or `score` to work on batches.

    Every worker process builds one instance; slow preparation, such as loading a model, belongs in `__init__`. A scorer may raise:
    a batch that raises is scored again image by image, and an image that raises becomes a failure with the exception's text.

    Attributes:
      name: what its service is called: the key of config.rewards, and the NAME of `xomni rewards NAME=URL`.
      version: what the values depend on, such as the formula; recorded beside evaluations.
      model_hash: of the weights that the values depend on, `model_files.model_hash`; "" without weights.
      scale: one sentence on what a value means and which ones are usual.
      range: smallest and largest value; what is outside is a failure.
      scope: which images `score` must get in one call: image (any), group (all of a group, whose items have the same item["group"]) or
        set (all of a request; it may remember earlier requests, see `state`).
      progress: share of the training that is done, where the client says so; set before each call.
      Options: a frozen dataclass whose fields are the flags of `xomni serve-reward`, explained under "Attributes:" in its docstring.
      options: the values of this instance.
    """

    name: str
    version: str = "1"
    model_hash: str = ""
    scale: str = ""
    range: tuple[float, float] = (-1e4, 1e4)
    scope = "image"
    progress: float | None = None

    @dataclass(frozen=True)
    class Options:
        """This scorer has none."""

    def __init__(self, **options: Any):
        self.options = build(self.Options, options, f"scorer {self.name}")

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """One score per image, in order. Images are uint8 [Y, X, 3] of any sizes; `items[i]` is what `images[i]` was asked to be."""
        return [self.score_image(image, item) for image, item in zip(images, items, strict=True)]

    def score_image(self, image: np.ndarray, item: Item) -> Score:
        """The score of one image: Score(value, detail={...}), or Score(None) when the scorer does not apply to the item."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """What a scorer of scope set remembers after a call. The client gets it with the answer and sends it with the next request."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` returned, perhaps in another process: before every call. ValueError when it does not fit."""


def scorer_class(name: str) -> type[Scorer]:
    """The class of a scorer: a shipped or installed name, or path/to/file.py:Class.

    Raises:
      RegistryError: nothing is registered under the name, or the file is missing or broken.
      ServiceError: a package is not installed, or the class is not a scorer.
    """
    try:
        cls = SCORERS.get(name)
    except ImportError as error:
        raise _missing(name, "rewards", error) from error
    if not (isinstance(cls, type) and issubclass(cls, Scorer) and getattr(cls, "name", "")):
        raise ServiceError(f"{name} is not a scorer; derive the class from xomni_jax.rewards.Scorer and set its name")
    return cls


def build_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """An instance of `scorer_class(name)`. ServiceError or ConfigError when it cannot start with these options."""
    return scorer_class(name)(**(options or {}))


def need(module: str, scorer: str, extra: str = "rewards") -> ModuleType:
    """Import a module that a scorer depends on. ServiceError when its package, part of `extra`, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(scorer, extra, error) from error


def _missing(scorer: str, extra: str, error: ImportError) -> ServiceError:
    return ServiceError(f"scorer {scorer!r} needs the package {(error.name or str(error))!r}: pip install 'xomni_jax[{extra}]'")
