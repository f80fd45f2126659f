"""Flow matching: the released scheduler's numbers, Euler steps, guidance, training pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.models import golden
from tests.parity.reference_flow import CASES
from xomni_jax.sampling.flow import (
    Conditioning,
    euler_sample,
    flow_sigmas,
    flow_training_pair,
    guided_velocity,
    null_conditioning,
    sample_sigmas,
)


def compare(arrays: dict[str, np.ndarray]) -> None:
    """Noise levels, and a whole sampling run under the velocity tanh(3 x) + sigma, against the scheduler's."""
    for n_steps, n_tokens in CASES:
        case = f"{n_steps}_{n_tokens}"
        sigmas = flow_sigmas(n_steps, n_tokens)
        np.testing.assert_allclose(sigmas, arrays[f"out/sigmas_{case}"], rtol=1e-5)
        data = euler_sample(lambda x, sigma_B: jnp.tanh(3 * x) + sigma_B[:, None], arrays["in/noise"], sigmas)
        golden.assert_close(data, arrays[f"out/data_{case}"], case, 1e-5)


def test_golden():
    compare(golden.load("flow"))


def test_sigmas_by_hand():
    e = np.exp(0.5)
    np.testing.assert_allclose(flow_sigmas(2, 256), [1.0, e / (e + 1), 0.0], rtol=1e-6)
    np.testing.assert_allclose(flow_sigmas(4, 99, base_shift=0.0, max_shift=0.0), [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)
    assert flow_sigmas(3, 5184)[1] > flow_sigmas(3, 4096)[1]  # not clamped at the largest token count


def test_euler_is_exact_on_a_straight_path(rng):
    noise, data = rng.normal(size=(2, 3, 5)).astype(np.float32)
    sampled = euler_sample(lambda x, sigma_B: jnp.asarray(noise - data), noise, flow_sigmas(3, 77))
    np.testing.assert_allclose(sampled, data, atol=1e-6)


def test_euler_gives_each_sample_its_sigma():
    seen = euler_sample(lambda x, sigma_B: sigma_B[:, None] * jnp.ones_like(x), np.zeros((2, 1)), np.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(seen, [[-0.75], [-0.75]])


def _conditions(rng):
    return Conditioning(*(rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (2, 5), (2, 6, 7))))


def test_guidance_formula_in_one_forward(rng):
    cond, calls = _conditions(rng), []
    negative = null_conditioning(cond, np.ones((3, 4), np.float32), np.full(5, 2.0, np.float32))

    def velocity(x, sigma_B, c):
        calls.append(x.shape[0])
        return (
            x * sigma_B[:, None, None]
            + c.text_BSE.sum((1, 2))[:, None, None]
            + c.pooled_BE.sum(1)[:, None, None]
            + c.semantics_BTC[..., :1]
        )

    x, sigma_B = rng.normal(size=(2, 6, 1)).astype(np.float32), np.array([0.3, 0.9], np.float32)
    guided = guided_velocity(velocity, x, sigma_B, cond, negative, 2.5)
    assert calls == [4]
    plain = guided_velocity(velocity, x, sigma_B, cond, None, 1.0)
    null = x * sigma_B[:, None, None] + 12 + 10
    np.testing.assert_allclose(guided, null + 2.5 * (plain - null), rtol=1e-5)


def test_null_conditioning_without_semantics(rng):
    cond = _conditions(rng)._replace(semantics_BTC=None)
    null = null_conditioning(cond, cond.text_BSE[0], cond.pooled_BE[0])
    assert null.semantics_BTC is None and null.text_BSE.shape == (2, 3, 4) and null.pooled_BE.shape == (2, 5)


def test_training_pair_lies_on_the_path(rng):
    data = rng.normal(size=(3, 4, 5)).astype(np.float32)
    noisy, sigma_B, velocity = flow_training_pair(jax.random.key(0), data)
    sigma = np.asarray(sigma_B)[:, None, None]
    np.testing.assert_allclose(noisy - sigma * velocity, data, atol=1e-5)
    np.testing.assert_allclose(noisy + (1 - sigma) * velocity, velocity + data, atol=1e-5)


def test_sigma_distributions():
    sigmas = np.asarray(sample_sigmas(jax.random.key(0), 20_000, mean=0.7, std=0.5))
    logits = np.log(sigmas / (1 - sigmas))
    assert abs(logits.mean() - 0.7) < 0.02 and abs(logits.std() - 0.5) < 0.02
    uniform = np.asarray(sample_sigmas(jax.random.key(0), 20_000, distribution="uniform"))
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(np.var(uniform) - 1 / 12) < 0.002
