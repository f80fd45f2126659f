"""Statistics of images that show reward hacking, summed over the processes that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def image_sums(images: np.ndarray) -> list[float]:
    """Sums over uint8 images [N, H, W, 3]: their number, their mean absolute gradients, and counts of 64 colours (4 levels a channel)."""
    x = images.astype(np.float32)
    edges = np.abs(np.diff(x, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(x, axis=2)).mean((1, 2, 3))
    level = images >> 6
    index = (level[..., 0].astype(np.int64) * 4 + level[..., 1]) * 4 + level[..., 2]
    return [len(images), float(edges.sum(dtype=np.float64)), *np.bincount(index.ravel(), minlength=64).tolist()]


def join_statistics(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """From the `image_sums` of all processes: edge density (mean absolute gradient, 0..255) and entropy of the colours in bits."""
    n, edges, *colours = np.sum(sums, axis=0)
    p = np.array(colours) / np.sum(colours)
    return {"image/edge_density": float(edges / n), "image/colour_entropy": float(-(p[p > 0] * np.log2(p[p > 0])).sum())}
