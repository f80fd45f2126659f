"""What an image looks like in numbers that do not depend on any reader: reward hacking would move them."""

from __future__ import annotations

import numpy as np

COLOUR_BINS = 64  # 4 levels per channel


def edge_density(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels, down plus across, 0..510 per image. uint8 [..., H, W, 3] -> [...]."""
    x = np.asarray(images, np.float32)
    return np.abs(np.diff(x, axis=-3)).mean((-3, -2, -1)) + np.abs(np.diff(x, axis=-2)).mean((-3, -2, -1))


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """Share of pixels in each of 64 colours. uint8 [..., H, W, 3] -> [..., 64], rows sum to 1."""
    level = np.asarray(images) >> 6
    index = ((level[..., 0].astype(np.int64) * 4 + level[..., 1]) * 4 + level[..., 2]).reshape(-1, level.shape[-3] * level.shape[-2])
    counts = np.stack([np.bincount(row, minlength=COLOUR_BINS) for row in index])
    return (counts / index.shape[-1]).reshape(*level.shape[:-3], COLOUR_BINS)


def colour_entropy(share: np.ndarray) -> float:
    """Bits of a colour distribution [64]; of the pooled images, so that it falls when all of them turn the same colour."""
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def code_agreement(codes: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Share of codes that come back when the decoded image is tokenised again. [..., Y, X] twice -> [...]."""
    return (np.asarray(codes) == np.asarray(again)).mean((-2, -1))
