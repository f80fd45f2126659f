"""The objective on denoising steps: worked numbers of the released loop, RatioNorm, and its gradient against a finite difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.core.config import ConfigError
from xomni_jax.rl.flow_objective import FlowConfig, clipped_loss, flow_loss, normalised_log_ratio, penalty
from xomni_jax.sampling.flow_sde import FlowPath, StepSizes, step_sizes

SIGMAS = np.array([1, 0.8, 0.5, 0.2, 0], np.float32)


@pytest.mark.parametrize(
    "log_ratio, advantages, ratio, loss",
    [
        ([0.0, 0.0], [1.0, -1.0], [1.0, 1.0], 0.0),
        ([0.0001, -0.0002], [1.0, 1.0], [1.0001000050, 0.9998000200], -0.9999500100),
        ([0.001, 0.0], [2.0, -1.0], [1.0010005002, 1.0], -0.5001),
        ([0.0, 0.0], [9.0, -9.0], [1.0, 1.0], 0.0),
    ],
)
def test_released_policy_losses(log_ratio, advantages, ratio, loss):
    found, _ = clipped_loss(jnp.array(log_ratio), jnp.array(advantages), FlowConfig())
    np.testing.assert_allclose(np.exp(log_ratio), ratio, rtol=1e-9)
    np.testing.assert_allclose(jnp.mean(found), loss, rtol=0, atol=1e-6)


def test_released_latent_penalty():
    """Means [[.1, .2], [0, 0]] against [[.1, .1], [0, .2]] with strength 1.4 and 0.7."""
    means, others = np.array([[0.1, 0.2], [0, 0]]), np.array([[0.1, 0.1], [0, 0.2]])
    for strength, expected in ((1.4, 0.0031887755), (0.7, 0.0127551020)):
        # With sigma 1 and no state the mean is the velocity times dt.
        sizes = StepSizes(jnp.float32(1.0), jnp.float32(-0.5), jnp.float32(strength))
        found = penalty(means / -0.5, others / -0.5, sizes, jnp.zeros((2, 2)), FlowConfig(penalty="latent"))
        np.testing.assert_allclose(jnp.mean(found), expected, rtol=1e-6)


def test_released_velocity_penalty():
    v, reference = np.array([[0.3, -0.2, 1.0]]), np.array([[0.25, -0.1, 0.8]])
    found = penalty(jnp.asarray(v), jnp.asarray(reference), step_sizes(SIGMAS, 1, 0.8), jnp.zeros((1, 3)), FlowConfig())
    np.testing.assert_allclose(found, [0.0175], rtol=1e-6)


@pytest.mark.parametrize("strength, dt, log_ratio", [(1.4, 0.3, -0.03302770325), (0.2, 0.05, -0.68401699437)])
def test_ratio_norm_removes_the_noise_level(strength, dt, log_ratio):
    """Shift (.01, -.02), noise (.5, -1): -shift . noise = -0.025 at both noise levels; sums over dimensions."""
    found = normalised_log_ratio(jnp.float32(log_ratio), jnp.float32(0.01**2 + 0.02**2), jnp.float32(strength * dt**0.5))
    np.testing.assert_allclose(found, -0.025, rtol=2e-6)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    sizes = step_sizes(SIGMAS, jnp.array([1, 1, 1]), 0.8)
    before, velocity = normal(3, 2, 4, 2), normal(3, 4, 2)
    mean = sizes.mean(before[:, 0], velocity)
    after = mean + sizes.spread[:, None, None] * normal(3, 4, 2)
    path = FlowPath(jnp.array([1, 1, 1]), before, jnp.stack([after, after], 1), jnp.stack([mean, mean], 1))
    return path, velocity, normal(3, 4, 2)


@pytest.mark.parametrize("normed", [True, False])
def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_log_prob(normed, case):
    """The loss is 0 for advantages that sum to 0, its gradient is not: -A d log p, times the spread where ratios are normalised."""
    path, velocity, _ = case
    adv, ok, cfg = jnp.array([1.0, -0.5, -0.5]), jnp.array([True, True, True]), FlowConfig(ratio_norm=normed)
    loss = lambda v: flow_loss(v, None, path, 0, SIGMAS, adv, ok, cfg, 3)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(velocity)
    assert abs(value) < 1e-6
    sizes = step_sizes(SIGMAS, 1, 0.8)
    noise = (path.after_BWTC[:, 0] - path.mean_BWTC[:, 0]) / sizes.spread
    scale = sizes.mean(jnp.zeros(()), jnp.ones(()))  # d mean / d velocity
    expected = -adv[:, None, None] * noise * scale * (1.0 if normed else 1 / sizes.spread) / (3 * 8)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_images_without_a_score_teach_nothing(case):
    path, velocity, reference = case
    adv, ok = jnp.array([1.0, 0.0, -1.0]), jnp.array([True, False, True])
    gradient = jax.grad(lambda v: flow_loss(v, reference, path, 0, SIGMAS, adv, ok, FlowConfig(penalty_coef=1.0), 2)[0])(velocity)
    assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="window=6 does not fit into within=5"):
        FlowConfig(window=6)
    with pytest.raises(ConfigError, match=r"config\.flow\.within=5, but config\.decode\.steps=2"):
        FlowConfig().check_steps(2)
