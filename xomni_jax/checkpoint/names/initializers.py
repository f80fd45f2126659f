"""Initialisers for parameters absent from the source."""

from __future__ import annotations

import math

import numpy as np

from xomni_jax.checkpoint.conversion import Initializer


def normal(std: float) -> Initializer:
    """A normal distribution around 0."""
    return Initializer(f"normal, standard deviation {std:g}", lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(std))


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return Initializer(f"{value:g}", lambda rng, shape: np.full(shape, value, np.float32))


def fan_in() -> Initializer:
    """Normal with variance 1 / inputs, where the last axis is the outputs."""
    return Initializer(
        "normal, variance 1 / inputs",
        lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(math.prod(shape[:-1]) ** -0.5),
    )


def unit_rows() -> Initializer:
    """Rows of length 1 in uniform directions, as for the quantizer's codebook."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        rows = rng.standard_normal(shape, np.float32)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    return Initializer("rows of length 1, uniform directions", draw)
