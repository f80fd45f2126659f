"""IBQ by hand: search, losses, straight-through gradient, starting and restarting codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.models import quantizer as Q


def test_nearest_is_by_angle_and_rows_are_raw():
    """Rows of length 3 and 1/2: the search compares directions, what comes out keeps the length."""
    codebook = jnp.array([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    z = Q.normalize(jnp.array([[[[0.8, 0.6], [0.1, 2.0]]]]))
    np.testing.assert_array_equal(Q.nearest_codes(z, codebook), [[[0, 1]]])
    out = Q.quantize_train(z, codebook)
    np.testing.assert_array_equal(out.rows, [[[[3.0, 0.0], [0.0, 0.5]]]])
    np.testing.assert_allclose(out.usage, [0.5, 0.5, 0.0])
    # First token: (3 - 0.8)^2 + 0.6^2 = 5.2; second, z = (0.1, 2) / |.|.
    z1 = np.array([0.1, 2.0]) / np.hypot(0.1, 2.0)
    mean = (5.2 + z1[0] ** 2 + (0.5 - z1[1]) ** 2) / 4
    for name in ("straight_through", "commitment", "codebook"):
        np.testing.assert_allclose(out.losses[name], mean, rtol=1e-5)
    np.testing.assert_allclose(out.losses["quantizer"], 2.25 * mean, rtol=1e-5)


def test_ties_go_to_the_lowest_code():
    codebook = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
    assert int(Q.nearest_codes(jnp.array([1.0, 0.0]), codebook)) == 1


def test_straight_through_equals_the_one_hot_formula(rng):
    """The lookup plus a zero mixture has the value and both gradients of (onehot - stop(soft) + soft) @ codebook."""
    z = Q.normalize(rng.normal(size=(2, 3, 5, 7)))
    codebook = jnp.asarray(rng.normal(size=(11, 7)), jnp.float32)
    g = rng.normal(size=z.shape).astype(np.float32)

    def literal(z, codebook):
        soft = jax.nn.softmax(-Q.squared_distances(z, codebook) / 2.0)
        hard = jax.nn.one_hot(jnp.argmax(soft, -1), 11)
        return jnp.sum(((hard - jax.lax.stop_gradient(soft) + soft) @ codebook) * g)

    def ours(z, codebook):
        return jnp.sum(Q.quantize_train(z, codebook).rows * g)

    np.testing.assert_allclose(ours(z, codebook), literal(z, codebook), rtol=1e-5)
    for a, b in zip(jax.grad(ours, (0, 1))(z, codebook), jax.grad(literal, (0, 1))(z, codebook)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_skipped_images_pass_z_but_count_in_losses(rng):
    z = Q.normalize(rng.normal(size=(2, 3, 5, 7)))
    codebook = jnp.asarray(rng.normal(size=(11, 7)), jnp.float32)
    plain, skipped = Q.quantize_train(z, codebook), Q.quantize_train(z, codebook, jnp.array([True, False]))
    np.testing.assert_array_equal(skipped.rows[0], z[0])
    np.testing.assert_array_equal(skipped.rows[1], plain.rows[1])
    assert skipped.losses == plain.losses


def test_normalize_has_a_gradient_at_zero():
    assert np.all(np.isfinite(jax.grad(lambda x: Q.normalize(x).sum())(jnp.zeros(3))))


def test_usage_metrics():
    uneven = Q.usage_metrics(jnp.array([0.5, 0.5, 0.0, 0.0]))
    np.testing.assert_allclose((uneven["used"], uneven["perplexity"]), (0.5, 2.0), rtol=1e-6)


def test_codebook_starts_from_distinct_outputs(rng):
    """1,000 copies of one background vector and 9 rare ones: every rare one gets a row before the background gets two."""
    rare = Q.normalize(rng.normal(size=(9, 6)))
    z = jnp.concatenate([jnp.tile(Q.normalize(jnp.ones((1, 6))), (1000, 1)), rare])
    book = np.asarray(jax.jit(Q.start_codebook, static_argnums=2)(jax.random.key(1), z, 10))
    assert len(np.unique(book.round(5), axis=0)) == 10
    # More rows than distinct outputs: still outputs, never rubbish.
    book = np.asarray(Q.start_codebook(jax.random.key(1), z, 13))
    np.testing.assert_allclose(np.linalg.norm(book, axis=-1), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="9 encoder outputs cannot start a codebook of 10 rows"):
        Q.start_codebook(jax.random.key(0), rare, 10)


def test_dead_codes_move_onto_badly_served_outputs(rng):
    book = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    usage = jnp.array([0.3, 0.0, 0.2, 0.001, 0.2, 0.1, 0.0, 0.199])
    # The first outputs sit exactly on living rows (well served), the last five lie elsewhere.
    served, new = Q.normalize(book[jnp.array([0, 2, 4])]), Q.normalize(rng.normal(size=(5, 5)))
    z = jnp.concatenate([served, new])
    np.testing.assert_array_equal(Q.dead_codes(usage), [False, True, False, True, False, False, True, False])
    moved, n = jax.jit(Q.restart_dead_codes)(jax.random.key(0), book, usage, z)
    assert int(n) == 3
    alive = np.array([0, 2, 4, 5, 7])
    np.testing.assert_array_equal(np.asarray(moved)[alive], np.asarray(book)[alive])
    nearest = [int(np.argmin(np.sum((np.asarray(z) - row) ** 2, -1))) for row in np.asarray(moved)[[1, 3, 6]]]
    np.testing.assert_allclose(np.asarray(z)[nearest], np.asarray(moved)[[1, 3, 6]], rtol=1e-6)
    assert len(set(nearest)) == 3 and min(nearest) >= 3
    # Fewer outputs than dead codes: as many move as there are outputs.
    _, n = Q.restart_dead_codes(jax.random.key(0), book, jnp.zeros(8), z[:2])
    assert int(n) == 2
    same, n = Q.restart_dead_codes(jax.random.key(0), book, jnp.full(8, 1 / 8), z)
    assert int(n) == 0 and np.array_equal(same, book)
