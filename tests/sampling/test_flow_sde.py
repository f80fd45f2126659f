"""Stochastic flow steps: worked numbers of FlowGRPO's released step, and paths that replay exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.sampling.flow import euler_sample, flow_sigmas
from xomni_jax.sampling.flow_sde import sde_sample, step_logp, step_sizes

SIGMAS = np.array([1, 0.8, 0.5, 0.2, 0], np.float32)
X, V = np.array([[0.5, -1.0, 2.0]], np.float32), np.array([[1.0, 0.3, -0.7]], np.float32)


# Step, noise level, next state -> mean, strength, spread, log-prob. A float64 transcription that agrees with the released float32 step.
@pytest.mark.parametrize(
    "step, level, after, mean, strength, spread, logp",
    [
        (0, 0.7, [0.3, -1.2, 2.2], [0.1775, -0.815, 1.65], 1.5652475842, 0.7, -0.7206755791),
        (1, 0.7, [0.1, -1.0, 2.1], [-0.05725, -0.74455, 1.52645], 1.4, 0.7668115805, -0.7721720625),
        (2, 0.8, [0.2, -1.1, 2.3], [0.008, -0.9268, 1.8932], 0.8, 0.4381780460, -0.2954999686),
        (3, 0.7, [0.3, -1.1, 2.1], [0.220375, -1.01345, 2.0518], 0.35, 0.1565247584, 0.8257094650),
        (1, 0.7, [-0.05725, -0.74455, 1.52645], [-0.05725, -0.74455, 1.52645], 1.4, 0.7668115805, -0.6534243677),
    ],
)
def test_released_steps(step, level, after, mean, strength, spread, logp):
    sizes = step_sizes(SIGMAS, step, level)
    found = sizes.mean(jnp.asarray(X), jnp.asarray(V))
    # Float32 of numbers near 1: a few units of 6e-8, and relatively more where a sum cancels.
    np.testing.assert_allclose(found[0], mean, rtol=0, atol=5e-7)
    np.testing.assert_allclose((sizes.s, sizes.spread), (strength, spread), rtol=5e-7)
    np.testing.assert_allclose(step_logp(jnp.asarray([after], jnp.float32), found, sizes.spread), [logp], rtol=2e-6)


def test_rows_at_different_steps():
    """One entry a row gives what each row gives alone."""
    x, v = np.tile(X, (3, 1)), np.tile(V, (3, 1))
    together = step_sizes(SIGMAS, jnp.array([0, 2, 3]), 0.7)
    means = together.mean(jnp.asarray(x), jnp.asarray(v))
    for row, step in enumerate((0, 2, 3)):
        alone = step_sizes(SIGMAS, step, 0.7)
        np.testing.assert_array_equal(means[row], alone.mean(jnp.asarray(X), jnp.asarray(V))[0])
        np.testing.assert_array_equal(step_logp(x, means, together.spread)[row], step_logp(X, means[row : row + 1], alone.spread)[0])


def velocity(x, sigma_B):
    """Of a curved flow, different for every row."""
    return jnp.sin(3 * x) * sigma_B[:, None, None] + 0.5 * x


@pytest.fixture(scope="module")
def drawn():
    sigmas = flow_sigmas(6, 256)
    noise = jax.random.normal(jax.random.key(0), (4, 5, 3))
    keys = jax.random.split(jax.random.key(1), 4)
    sample = jax.jit(lambda noise, keys, first, level: sde_sample(velocity, noise, sigmas, keys, first, 2, level), static_argnums=3)
    return sigmas, noise, keys, sample


@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_path_replays_exactly(first, drawn):
    """The stored states give the stored means and log-probs again, and its noise is standard normal and that of the keys."""
    sigmas, noise, keys, sample = drawn
    data, path = sample(noise, keys, first, 0.7)
    np.testing.assert_array_equal(path.step_B, first)
    for i in range(2):
        sizes = step_sizes(sigmas, path.step_B + i, 0.7)
        mean = jax.jit(lambda x, s: s.mean(x, velocity(x, s.sigma)))(path.before_BWTC[:, i], sizes)
        np.testing.assert_allclose(mean, path.mean_BWTC[:, i], rtol=0, atol=1e-6)
        own = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, first + i), (5, 3)))(keys)
        np.testing.assert_allclose((path.after_BWTC[:, i] - mean) / sizes.spread[0], own, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(path.after_BWTC[:, 0], path.before_BWTC[:, 1])
    rest = euler_sample(velocity, path.after_BWTC[:, 1], sigmas[first + 2 :])
    np.testing.assert_allclose(data, rest, rtol=0, atol=1e-6)


def test_without_noise_it_is_the_euler_sampler(drawn):
    sigmas, noise, keys, sample = drawn
    data, path = sample(noise, keys, 1, 1e-9)
    np.testing.assert_allclose(data, euler_sample(velocity, noise, sigmas), rtol=0, atol=2e-6)


def test_an_image_does_not_depend_on_its_batch(drawn):
    _, noise, keys, sample = drawn
    whole, path = sample(noise, keys, 2, 0.7)
    order = np.array([2, 0, 3, 1])
    moved, again = sample(noise[order], keys[order], 2, 0.7)
    np.testing.assert_array_equal(moved, whole[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), again, path)
