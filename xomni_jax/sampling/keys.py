"""PRNG keys of images, and what follows from them on the host."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.sequence.orders import completion_order

# Purposes of the keys of an image: 0 is the sampler's, NOISE that of the decoder's noise.
NOISE = 1


def image_keys(seed: int, images: int | np.ndarray, purpose: int = 0) -> jax.Array:
    """A key for each of so many images, or of the images of these numbers, from (seed, purpose, number): it can be made again alone."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie within 0..{2**32 - 1}")
    return _fold_numbers(np.uint32(seed), np.arange(images) if isinstance(images, int) else images, purpose)


@functools.partial(jax.jit, static_argnums=2)
def _fold_numbers(seed: Any, numbers_B: Any, purpose: int) -> jax.Array:
    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(numbers_B)


def item_keys(seed: int, name: str, ids: Sequence[str], repeats: int, purpose: int) -> jax.Array:
    """One key per item and repeat [P, R], from (seed, purpose, name of the suite, id, repeat): any image can be drawn again alone."""
    digests = [hashlib.sha256(f"{name}\n{id}".encode()).digest()[:8] for id in ids]
    words_P2 = np.frombuffer(b"".join(digests), ">u4").reshape(-1, 2).astype(np.uint32)
    return _fold(np.uint32(seed), words_P2, repeats, purpose)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fold(seed: Any, words_P2: Any, repeats: int, purpose: int) -> jax.Array:
    root = jax.random.fold_in(jax.random.key(seed), purpose)

    def of_item(words):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(repeats))

    return jax.vmap(of_item)(words_P2)


def image_orders(order: str, grid: tuple[int, ...], keys_PR: jax.Array, known: np.ndarray | None = None) -> np.ndarray | None:
    """The cells of R images of each of P prompts in the order in which a model of this `order` draws them, int32 [P, R, T]; None where
    that is row by row. That of an image depends on its key alone, and begins with its `known` cells (bool, of the grid's shape)."""
    if order == "raster":
        return None
    known = np.zeros(grid, bool) if known is None else known
    words = np.asarray(jax.random.key_data(keys_PR))
    drawn = [completion_order(known, np.random.default_rng(key)) for key in words.reshape(-1, words.shape[-1])]
    return np.reshape(drawn, (*keys_PR.shape, -1))
