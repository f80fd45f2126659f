"""Ink coverage of letters and shapes, from which the rendered examples are composed; drawn once and cached."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

CELL_Y, CELL_X = 16, 8  # one character: two token rows, one token column at patch 8
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHAPES = ("circle", "square", "triangle", "star")

# The first face is the main one: at 13.3 px its letters are exactly 8 px apart. Sans Bold is proportional: wide letters are squeezed.
FACES = ("DejaVuSansMono-Bold", "DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSans-Bold")
_FONT_PX, _BASELINE = 13.3, 13  # capitals fill rows 3 to 12 of the cell, the tail of Q reaches row 14
_OVER = 8  # oversampling of squeezed letters and of shapes


@functools.cache
def letter(face: str, char: str) -> np.ndarray:
    """Coverage [16, 8] in [0, 1] of one upper-case letter or space in its cell."""
    if char == " ":
        return np.zeros((CELL_Y, CELL_X), np.float32)
    from PIL import Image, ImageDraw

    if face != "DejaVuSans-Bold":
        cell = Image.new("L", (CELL_X, CELL_Y))
        ImageDraw.Draw(cell).text((CELL_X / 2, _BASELINE), char, font=_font(face, _FONT_PX), fill=255, anchor="ms")
    else:
        font = _font(face, _FONT_PX * _OVER)
        left, _, right, _ = font.getbbox(char, anchor="ls")
        big = Image.new("L", (right - left, CELL_Y * _OVER))
        ImageDraw.Draw(big).text((-left, _BASELINE * _OVER), char, font=font, fill=255, anchor="ls")
        width = min(CELL_X, round((right - left) / _OVER))
        cell = Image.new("L", (CELL_X, CELL_Y))
        cell.paste(big.resize((width, CELL_Y), Image.Resampling.BOX), ((CELL_X - width) // 2, 0))
    return _coverage(cell)


@functools.cache
def shape(name: str, size: int) -> np.ndarray:
    """Coverage [size, size] in [0, 1] of a filled shape that touches its box."""
    from PIL import Image, ImageDraw

    n = size * _OVER
    big = Image.new("L", (n, n))
    draw = ImageDraw.Draw(big)
    if name == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif name == "square":
        # Smaller than its box, so that its area is near the circle's: the size must not reveal the shape.
        draw.rectangle((n // 16, n // 16, n - 1 - n // 16, n - 1 - n // 16), fill=255)
    elif name == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    else:  # a star
        angle = np.pi / 5 * np.arange(10) - np.pi / 2
        radius = np.where(np.arange(10) % 2, 0.42, 1.0) * n * 0.525
        draw.polygon(list(zip(n / 2 + radius * np.cos(angle), n * 0.55 + radius * np.sin(angle), strict=True)), fill=255)
    return _coverage(big.resize((size, size), Image.Resampling.BOX))


@functools.cache
def _font(face: str, pixels: float):
    """A DejaVu face from matplotlib's own copy, which every installation has."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), pixels)


def _coverage(image) -> np.ndarray:
    coverage = np.asarray(image, np.float32) / 255
    coverage.flags.writeable = False  # cached and shared
    return coverage
