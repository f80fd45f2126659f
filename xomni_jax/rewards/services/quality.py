"""An image-quality reward without a trained judge: nearness to clean images of its kind, in the features of a frozen network.

What it can tell: noise, blur, compression, and less surely shuffled patches, each in the right direction (`auc_table`; AUC on
rendered images of held-out words: 1.00, 0.96 to 0.99, 0.98 and 0.70). What it cannot tell: beauty, or whether the image is
the one that was asked for. An image of another kind than the references scores low however good it is, so give references of
the kind that is trained. BRISQUE and its like are not used: made for photographs, they call noise an improvement on drawings.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from xomni_jax.rewards.protocol import ProtocolError, decode_image
from xomni_jax.rewards.services.base import ServiceError
from xomni_jax.rewards.services.efficientnet import EfficientNetLite0

_NEIGHBOURS = 5
_REFERENCES = 400
_SIDE = 64  # small images are enlarged to this height: the network saw 224 pixels in training


class QualityScorer:
    """(1 + mean cosine to the 5 nearest references) / 2, in [0, 1], of features standardised over them. Needs no target.

    references: a folder of PNG, JPEG or WebP images, or None for 400 rendered training images. Detail: cosine.
    """

    name = "quality"

    def __init__(self, references: str | None = None):
        images = rendered_references() if references is None else _read_folder(Path(references))
        self._network = EfficientNetLite0()
        features_ND = np.stack([self._features(i) for i in images])
        self._mean_D, self._std_D = features_ND.mean(0), features_ND.std(0) + 1e-3
        self._references_ND = self._standardise(features_ND)
        self.version = f"knn-efficientnet-lite0/{len(images)}-{'rendered' if references is None else Path(references).name}"

    def score(self, image: np.ndarray, item: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
        """See Scorer."""
        similarity_N = self._references_ND @ self._standardise(self._features(image))
        cosine = float(np.sort(similarity_N)[-_NEIGHBOURS:].mean())
        return (1 + cosine) / 2, {"cosine": cosine}

    def _features(self, image: np.ndarray) -> np.ndarray:
        scale = max(1, round(_SIDE / image.shape[0]))
        # Whole factors, pixels repeated: interpolation would blur the very thing that is judged.
        return self._network(image.repeat(scale, 0).repeat(scale, 1))

    def _standardise(self, x: np.ndarray) -> np.ndarray:
        x = (x - self._mean_D) / self._std_D
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def rendered_references(count: int = _REFERENCES, seed: int = 20250701) -> list[np.ndarray]:
    """Rendered training images, uint8 [Y, X, 3] each."""
    from xomni_jax.data.rendered import RenderedConfig, render_example

    config = RenderedConfig()
    return [render_example(seed, n, config)["image"] for n in range(count)]


def _patch_shuffle(image: np.ndarray, rng: np.random.Generator, share: float = 0.1, patch: int = 8) -> np.ndarray:
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    cells = rng.permutation(rows * columns)[: max(2, round(share * rows * columns))]
    out = image.copy()
    for a, b in zip(cells, np.roll(cells, 1)):
        (ya, xa), (yb, xb) = divmod(int(a), columns), divmod(int(b), columns)
        out[ya * patch : (ya + 1) * patch, xa * patch : (xa + 1) * patch] = image[
            yb * patch : (yb + 1) * patch, xb * patch : (xb + 1) * patch
        ]
    return out


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=15)
    return np.array(Image.open(out).convert("RGB"))


def _noise(sigma: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    return lambda image, rng: np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def _blur(radius: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    return lambda image, rng: np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


SPOILERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise 10": _noise(10),
    "noise 25": _noise(25),
    "blur 1": _blur(1),
    "blur 2": _blur(2),
    "jpeg 15": _jpeg,
    "patches shuffled": _patch_shuffle,
}


def auc_table(scorer: Any, images: Sequence[np.ndarray], seed: int = 0) -> dict[str, float]:
    """For every spoiler, the chance that a clean image scores above a spoiled one (0.5: blind, below: inverted)."""
    rng = np.random.default_rng(seed)
    clean = np.array([scorer.score(i, {})[0] for i in images])
    table = {}
    for name, spoil in SPOILERS.items():
        bad = np.array([scorer.score(spoil(i, rng), {})[0] for i in images])
        table[name] = float((clean[:, None] > bad).mean() + 0.5 * (clean[:, None] == bad).mean())
    return table


def _read_folder(folder: Path) -> list[np.ndarray]:
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")) if folder.is_dir() else []
    if len(files) < _NEIGHBOURS:
        raise ServiceError(
            f"--references {folder} holds {len(files)} images; give a folder of {_NEIGHBOURS} or more PNG, JPEG or WebP files"
        )
    try:
        return [decode_image(p.read_bytes()) for p in files]
    except ProtocolError as error:
        raise ServiceError(f"--references {folder} holds an image that cannot be read: {error}") from error
