"""Quality without a trained judge: likeness to clean images of the same kind; notices noise, blur and compression.

Measured in the features of a frozen network, on rendered images of held-out words, the chance that a clean image scores above a
damaged one is 1.00 for noise, 0.96 to 0.99 for blur, 0.98 for JPEG and 0.70 for shuffled patches (tests/rewards/damage.py). It cannot
judge beauty, nor whether the image is the one that was asked for. Images of another kind than the references score low however good
they are, so references should be of the kind that is trained. BRISQUE and similar measures are not used: they were made for
photographs, and call noise an improvement on drawings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.data.images import UnreadableImage, read_image
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer, ServiceError
from xomni_jax.rewards.services.efficientnet import EfficientNetLite0

_NEIGHBOURS = 5
_REFERENCES = 400


class QualityScorer(Scorer):
    """(1 + mean cosine to the 5 nearest references) / 2, in [0, 1], of features standardised over the references.

    Applies to every item. Detail: cosine.
    """

    name = "quality"
    range = (-1e-6, 1 + 1e-6)  # cosines are rounded

    @dataclass(frozen=True)
    class Options:
        """What counts as good.

        Attributes:
          references: a folder of PNG, JPEG or WebP images; without one, 400 rendered training images.
        """

        references: str | None = None

    def __init__(self, **options: Any):
        super().__init__(**options)
        folder = self.options.references
        images = rendered_references() if folder is None else read_references(Path(folder), _NEIGHBOURS)
        self._network = EfficientNetLite0()
        features_ND = np.stack([self._network(image) for image in images])
        self._mean_D, self._std_D = features_ND.mean(0), features_ND.std(0) + 1e-3
        self._references_ND = self._standardise(features_ND)
        self.version = f"knn-efficientnet-lite0/{len(features_ND)}-{'rendered' if folder is None else Path(folder).name}"

    def score_image(self, image: np.ndarray, item: Item) -> Score:
        """See Scorer."""
        similarity_N = self._references_ND @ self._standardise(self._network(image))
        cosine = float(np.sort(similarity_N)[-_NEIGHBOURS:].mean())
        return Score((1 + cosine) / 2, None, {"cosine": cosine})

    def _standardise(self, x: np.ndarray) -> np.ndarray:
        x = (x - self._mean_D) / self._std_D
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def rendered_references(count: int = _REFERENCES, seed: int = 20250701) -> list[np.ndarray]:
    """Rendered training images, uint8 [Y, X, 3] each."""
    from xomni_jax.data.rendered import RenderedConfig, render_example

    config = RenderedConfig()
    return [render_example(seed, n, config)["image"] for n in range(count)]


def read_references(folder: Path, least: int) -> Iterator[np.ndarray]:
    """The images of a folder, uint8 [Y, X, 3] each. ServiceError when there are fewer than `least`, or one cannot be read."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(files) < least:
        raise ServiceError(f"--references {folder} holds {len(files)} images; give a folder of {least} or more PNG, JPEG or WebP files")
    for file in files:
        try:
            yield np.array(read_image(file))
        except UnreadableImage as error:
            raise ServiceError(f"--references {folder}: the image {file.name} cannot be read: {error}; take it away") from error
