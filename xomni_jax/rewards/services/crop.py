"""Foreground of images with a flat background: the background is the median of the border, ink is whatever differs from it."""

from __future__ import annotations

import numpy as np

INK = 40.0  # a pixel is ink when a channel differs by more than this from the background


def background_colour(image: np.ndarray) -> np.ndarray:
    """Per-channel median of the border pixels. uint8 [Y, X, 3] -> float32 [3]."""
    ring = (image[0], image[-1], image[:, 0], image[:, -1])
    return np.median(np.concatenate(ring), axis=0).astype(np.float32)


def ink_mask(image: np.ndarray) -> np.ndarray:
    """Pixels that differ from the background. uint8 [Y, X, 3] -> bool [Y, X]."""
    return np.abs(image.astype(np.float32) - background_colour(image)).max(-1) > INK


def text_lines(image: np.ndarray, pad: int = 4) -> list[np.ndarray]:
    """The lines of ink from top to bottom, each with `pad` pixels of plain background around it; [] without ink.

    Plain padding instead of more of the image keeps specks out. Lines are not enlarged: recognisers resize by themselves.
    """
    ink, background = ink_mask(image), background_colour(image).astype(np.uint8)
    crops = []
    for top, bottom in _rows_of_lines(ink.any(1)):
        columns = np.flatnonzero(ink[top:bottom].any(0))
        box = image[top:bottom, columns[0] : columns[-1] + 1]
        crop = np.empty((box.shape[0] + 2 * pad, box.shape[1] + 2 * pad, 3), np.uint8)
        crop[:] = background
        crop[pad : pad + box.shape[0], pad : pad + box.shape[1]] = box
        crops.append(crop)
    return crops


def _rows_of_lines(inked: np.ndarray) -> list[tuple[int, int]]:
    """[Y] bool -> (top, bottom) of each line. Only wide gaps separate lines, so that the dot of an i stays with its letter."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inked.astype(np.int8), [0]))))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist()))
    if not runs:
        return []
    tallest = max(bottom - top for top, bottom in runs)
    lines = [runs[0]]
    for top, bottom in runs[1:]:
        if top - lines[-1][1] < max(3, 0.3 * tallest):
            lines[-1] = (lines[-1][0], bottom)
        else:
            lines.append((top, bottom))
    return [line for line in lines if line[1] - line[0] >= tallest / 3]  # lower runs are specks
