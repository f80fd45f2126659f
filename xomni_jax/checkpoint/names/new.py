"""How parameters start that no checkpoint provides: (description, function of a generator and a shape) for `conversion.Make`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(std: float) -> tuple[str, Draw]:
    """A centred normal distribution."""
    return f"normal, standard deviation {std:g}", lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(std)


def constant(value: float) -> tuple[str, Draw]:
    """All the same."""
    return f"{value:g}", lambda rng, shape: np.full(shape, value, np.float32)


def fan_in() -> tuple[str, Draw]:
    """Normal with variance 1 / inputs; the last axis is the outputs."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(math.prod(shape[:-1]) ** -0.5)

    return "normal, variance 1 / inputs", draw


def unit_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of length 1 in uniform directions: how the quantizer's codebook starts."""
    rows = rng.standard_normal(shape, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
