"""Attention by hand and in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.models.attention import attend


def _qkv(rng):
    return (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (7, 5, 5))


def test_equals_the_formula(rng):
    q, k, v = _qkv(rng)
    bias = rng.normal(size=(3, 7, 5)).astype(np.float32)
    scores = np.einsum("blnh,bsnh->bnls", q, k) * 0.3 + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(attend(q, k, v, scale=0.3, bias=bias), np.einsum("bnls,bsnh->blnh", weights, v), rtol=1e-5, atol=1e-6)


def test_large_scores_stay_finite(rng):
    q, k, v = _qkv(rng)
    y, gradient = jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v, scale=1e4)))(q)
    assert np.isfinite(y) and np.isfinite(gradient).all()


def test_chunks_change_neither_values_nor_gradients(rng):
    q, k, v = _qkv(rng)

    def run(chunk):
        return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, scale=0.3, query_chunk=chunk))), (0, 1, 2))(q, k, v)

    whole = jax.tree.leaves(run(0))
    for chunk in (3, 7):  # with and without a padded rest
        for a, b in zip(jax.tree.leaves(run(chunk)), whole):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
