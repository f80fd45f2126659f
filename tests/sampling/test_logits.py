"""Logit processing against worked numbers and against its own definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.oracle import masked_logp
from xomni_jax.models.vocab_heads import token_logp
from xomni_jax.sampling.logits import GREEDY, SamplingConfig, TracedSampling, draw, guide, sampling_mask, temper

COND, NEG = jnp.array([2.0, 1.0, 0.5, -1.0, -3.0]), jnp.array([1.0, 1.2, 0.8, -0.5, -2.0])
OFF = dict(top_k=0, min_p=0.0)
# id: settings, token, log-prob of the untruncated distribution, mask tokens, mask mass, truncated log-prob, entropy. float64 by hand.
EXAMPLES = {
    "samp-01": (dict(), 0, -0.4992799988198058, 5, 1.0, -0.4992799988198059, 1.0368259857284707),
    "samp-02": (dict(temperature=0.7), 1, -1.744494308580682, 5, 1.0, -1.7444943085806819, 0.7959659730945031),
    "samp-03": (dict(top_p=0.9), 1, -1.4992799988198058, 3, 0.9656911516186406, -1.464368784107945, 1.0368259857284707),
    "samp-04": (dict(min_p=0.03), 3, -3.499279998819806, 4, 0.9959102850217283, -3.4951818980858564, 1.0368259857284707),
    "samp-05": (dict(min_p=0.03), 4, -5.499279998819806, 4, 0.9959102850217283, -np.inf, 1.0368259857284707),
    "samp-06": (dict(guidance=1.5), 0, -0.29593083799871966, 5, 1.0, -0.2959308379987197, 0.7991671627510842),
    "samp-07": (dict(guidance=5.0), 0, -0.004374554450508289, 5, 1.0, -0.004374554450508262, 0.031203930585930066),
    "samp-08": (dict(guidance=5.0, temperature=5.0), 0, -0.5960327478141152, 5, 1.0, -0.5960327478141151, 1.2600713185090724),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name):
    settings, token, full, n_left, mass, truncated, entropy = EXAMPLES[name]
    sampling = SamplingConfig(**OFF | settings)
    scores = guide(COND, NEG, sampling.guidance)
    mask = sampling_mask(scores, sampling)
    np.testing.assert_array_equal(mask, np.arange(5) < n_left)
    logp = masked_logp(scores, None, sampling.temperature)
    np.testing.assert_allclose(logp[token], full, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(jnp.exp(logp)[mask].sum(), mass, rtol=1e-6)
    np.testing.assert_allclose(masked_logp(scores, mask, sampling.temperature)[token], truncated, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(token_logp(temper(scores, sampling.temperature), jnp.int32(token))[1], entropy, rtol=1e-4)


def test_defaults_are_the_released_sampler():
    assert SamplingConfig() == SamplingConfig(temperature=1.0, top_k=50, top_p=1.0, min_p=0.03, guidance=1.0)
    assert SamplingConfig().truncates and not SamplingConfig(**OFF).truncates and GREEDY.truncates


def test_ties_at_the_border():
    scores = jnp.array([1.0, 3.0, 1.0, 2.0, 1.0, 3.0])
    np.testing.assert_array_equal(sampling_mask(scores, SamplingConfig(top_k=1, min_p=0.0)), [0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(sampling_mask(scores, SamplingConfig(top_k=4, min_p=0.0)), [1] * 6)
    # Half of two equal best tokens is enough for top_p=0.3: the later id stays.
    np.testing.assert_array_equal(sampling_mask(scores, SamplingConfig(top_k=0, top_p=0.3, min_p=0.0)), [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(sampling_mask(scores, SamplingConfig(top_k=0, min_p=1.0)), [0, 1, 0, 0, 0, 1])


def test_order_is_top_k_then_top_p_then_min_p():
    # After top-k=2 the two best hold all the mass, so top-p=0.7 keeps one; on the full distribution it would keep two.
    scores = jnp.log(jnp.array([0.4, 0.15, 0.15, 0.15, 0.15])) + jnp.array([0.0, 0.01, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(sampling_mask(scores, SamplingConfig(top_k=2, top_p=0.7, min_p=0.0)), [1, 0, 0, 0, 0])
    assert sampling_mask(scores, SamplingConfig(top_k=0, top_p=0.7, min_p=0.0)).sum() > 2


def test_draws_follow_the_truncated_distribution():
    sampling = SamplingConfig(temperature=0.9, top_k=4, min_p=0.05)
    keys = jax.random.split(jax.random.key(3), (1, 8000))
    scores = jnp.broadcast_to(COND, (1, 8000, 5))
    tokens, logp, mask = jax.jit(draw, static_argnums=2)(scores, keys, sampling)
    expected = np.exp(masked_logp(COND, sampling_mask(COND, sampling), 0.9))
    np.testing.assert_allclose(np.bincount(tokens[0], minlength=5) / 8000, expected, atol=0.02)
    np.testing.assert_allclose(np.exp(logp[0]), expected[tokens[0]], rtol=1e-5)
    assert bool(jnp.all(jnp.take_along_axis(mask, tokens[..., None], -1)))


def test_greedy_is_a_point_mass():
    tokens, logp, mask = draw(jnp.stack([COND, NEG])[None], jax.random.split(jax.random.key(0), (1, 2)), GREEDY)
    assert tokens.tolist() == [[0, 1]] and logp.tolist() == [[0.0, 0.0]] and mask.sum() == 2


def test_gradients_stay_finite_under_a_mask():
    mask = jnp.array([True, False, True, False, False])
    grad = jax.grad(lambda z: sum(jnp.sum(x) for x in token_logp(z, jnp.int32(2), mask)))(COND)
    assert np.isfinite(grad).all() and (grad[~mask] == 0).all()


INF, NAN, DENORMAL = float("inf"), float("nan"), 1e-45


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(temperature=t) for t in (NAN, INF, -INF, -1.0, -DENORMAL, DENORMAL, 1e-38, 1e-30, 1e-7)),
        *(dict(top_k=k) for k in (-1, 1.5, NAN, INF)),
        *(dict(top_p=p) for p in (0, -DENORMAL, 1 + 1e-9, NAN, INF)),
        *(dict(min_p=p) for p in (-DENORMAL, 1 + 1e-9, NAN, INF)),
        *(dict(guidance=g) for g in (-DENORMAL, NAN, INF, 1e30, 3e38)),
    ],
    ids=str,
)
def test_settings_that_cannot_be_computed_with_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^sampling {name}=.*; use "):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(temperature=t) for t in (1e-6, 1e30, 3e38)), dict(top_k=10**30), dict(top_k=2.0), dict(top_p=DENORMAL),
        dict(top_p=1 - 1e-16), dict(min_p=DENORMAL), dict(min_p=1), dict(guidance=0), dict(guidance=1e4),
        dict(guidance=1e4, temperature=1e-6, top_p=1e-9, min_p=1),
    ],
    ids=str,
)  # fmt: skip
def test_extreme_settings_draw_a_token_of_the_vocabulary_at_a_finite_log_probability(settings):
    """Of scores that are as far apart as those of models get, with a token that is masked by the dtype's minimum."""
    sampling = SamplingConfig(**settings)
    scores = jnp.array([[[-90.0, 80.0, 79.9, -3e4, float(jnp.finfo(jnp.float32).min)]]])
    guided = guide(scores, jnp.zeros_like(scores) if sampling.guided else None, sampling.guidance)
    tokens, logp, mask = draw(guided, jax.random.split(jax.random.key(0), (1, 1)), sampling)
    assert 0 <= int(tokens[0, 0]) < 5 and np.isfinite(logp).all() and logp[0, 0] <= 0 and bool(mask[0, 0, tokens[0, 0]])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.6, "min_p": 0.0},
        {"temperature": 0.0},
        {"top_k": 7, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
        {"top_k": 10**9},
    ],
)
def test_traced_settings_sample_the_same(values, rng):
    """The mask and the tokens of `SamplingConfig`, from one program for all values."""
    scores = jnp.asarray(rng.normal(0, 2, (4, 3, 40)), jnp.float32).at[0, 0, 5:9].set(1.5)  # ties, too
    keys, config = jax.random.split(jax.random.key(1), (4, 3)), SamplingConfig(**values)
    tokens, logp, mask = draw(scores, keys, config)
    traced = jax.jit(draw)(scores, keys, TracedSampling.of(config))
    np.testing.assert_array_equal(traced[0], tokens)
    np.testing.assert_array_equal(traced[2], mask)
    np.testing.assert_allclose(traced[1], logp, rtol=1e-6, atol=1e-6)
