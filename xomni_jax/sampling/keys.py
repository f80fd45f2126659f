"""PRNG keys of images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NOISE = 1  # purpose of the keys of the decoder's noise; 0 is the sampler's


def image_keys(seed: int, n: int, purpose: int = 0) -> jax.Array:
    """Keys [n], each from (seed, purpose, index of the image), so that an image can be made again alone."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie within 0..{2**32 - 1}")
    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(n))
