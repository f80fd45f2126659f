"""Damage to images that a quality measure should notice, and how often it does."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter


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


DAMAGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise 10": _noise(10),
    "noise 25": _noise(25),
    "blur 1": _blur(1),
    "blur 2": _blur(2),
    "jpeg 15": _jpeg,
    "patches shuffled": _patch_shuffle,
}


def auc_table(score: Callable[[np.ndarray], float], images: Sequence[np.ndarray], seed: int = 0) -> dict[str, float]:
    """For every kind of damage, the chance that a clean image scores above a damaged one (0.5: blind, below: inverted)."""
    rng = np.random.default_rng(seed)
    clean = np.array([score(i) for i in images])
    table = {}
    for name, damage in DAMAGES.items():
        bad = np.array([score(damage(i, rng)) for i in images])
        table[name] = float((clean[:, None] > bad).mean() + 0.5 * (clean[:, None] == bad).mean())
    return table
