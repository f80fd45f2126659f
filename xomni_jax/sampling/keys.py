"""Keys of images: which random numbers an image is drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NOISE = 1  # purpose of the decoder's key, beside the sampler's


def image_keys(seed: int, n: int, purpose: int = 0) -> jax.Array:
    """One key per image [n], from (seed, purpose, index): an image can be drawn again alone."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie within 0..{2**32 - 1}")
    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(n))
