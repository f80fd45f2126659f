"""8-bit kernels for frozen models, with one scale per output channel: half the memory of bfloat16, computed in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 127  # of int8, symmetric: -128 is not used


def quantize_kernel(kernel: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(int8 of the kernel's shape, float32 scales without the contracted axes): kernel = int8 * scale, to within scale / 2."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=contracted, keepdims=True) / LARGEST
    scale = jnp.where(scale == 0, 1.0, scale)  # a kernel of zeros
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, contracted)


def quantize(params: Mapping[str, Any], boxed: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a model -> those of the same model with `int8=True`.

    Args:
      params: unboxed tree in float. boxed: the int8 model's tree as `registry.init_params` makes it, shapes are enough.
    """
    out: dict[str, Any] = {}
    for name, leaf in boxed.items():
        kernel = name.removesuffix("_scale")
        if isinstance(leaf, Mapping):
            out[name] = quantize(params[name], leaf)
        elif leaf.value.dtype == jnp.int8:
            first = leaf.names[0] == "layers"
            contracted = tuple(range(first, first + leaf.value.ndim - boxed[f"{name}_scale"].value.ndim))
            out[name], out[f"{name}_scale"] = quantize_kernel(params[name], contracted)
        elif kernel == name or kernel not in boxed:
            out[name] = params[name]
    return out
