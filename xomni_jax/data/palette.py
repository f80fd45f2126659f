"""The colours of rendered pictures: one table from name to RGB, shared by the renderer and by the colour scorer."""

from __future__ import annotations

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 40),
    "green": (40, 150, 70),
    "blue": (45, 80, 205),
    "yellow": (245, 210, 55),
    "purple": (135, 60, 170),
    "orange": (240, 130, 30),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
}
GROUNDS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "orange")  # what a sign may be painted with
_NAMES = tuple(PALETTE)
_TABLE = np.array([PALETTE[name] for name in _NAMES], np.float32)


def nearest_names(pixels: np.ndarray) -> np.ndarray:
    """Name of the palette colour nearest to each pixel (Euclidean in RGB). [..., 3] of 0..255 -> [...] of str."""
    distance = ((np.asarray(pixels, np.float32)[..., None, :] - _TABLE) ** 2).sum(-1)
    return np.array(_NAMES)[distance.argmin(-1)]


def rgb(name: str) -> tuple[int, int, int]:
    """RGB of a palette colour. ValueError when the name is unknown."""
    if name not in PALETTE:
        raise ValueError(f"colour {name!r} is not in the palette; choose one of {', '.join(PALETTE)}")
    return PALETTE[name]
