"""Reading golden files, and comparing a linen model with them."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import jax
import numpy as np

from tests import name_tables

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/goldens/NAME.npz."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Arrays under `prefix/`, without the prefix."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}


def shapes(model: nn.Module, *args, **kw) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a model's parameters; nothing is computed."""
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kw))["params"]
    return {path: leaf.shape for path, leaf in name_tables.flatten(nn.meta.unbox(boxed)).items()}


def assert_close(actual, expected, name: str, tolerance: float = 1e-4) -> None:
    """Largest difference at most `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, reference {expected.shape}"
    scale = np.abs(expected).max()
    assert np.isfinite(actual).all() and scale > 0, f"{name}: not finite, or an empty comparison"
    error = np.abs(actual - expected).max() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


def assert_gradients(
    gradients,
    reference: dict[str, np.ndarray],
    table: name_tables.NameTable,
    wanted,
    *,
    zero: tuple[str, ...] = (),
    tolerance: float = 1e-4,
) -> None:
    """Compares every parameter's gradient with the reference's, brought over by the same table as the weights.

    `zero` names the endings of paths whose gradient vanishes in exact arithmetic (a key bias under softmax): both sides hold rounding
    noise there, which must stay below 1e-6 of the largest gradient of all. Every other one is measured by its own largest value.
    """
    expected = name_tables.flatten(name_tables.to_params(reference, table, wanted))
    largest = max(np.abs(v).max() for v in expected.values())
    for path, value in name_tables.flatten(gradients).items():
        if path.endswith(zero):
            noise = max(np.abs(value).max(), np.abs(expected[path]).max()) / largest
            assert noise <= 1e-6, f"gradient of {path}: {noise:.2e} of the largest gradient, should vanish"
        else:
            assert_close(value, expected[path], f"gradient of {path}", tolerance)
