"""Weights that follow what a run measures: the released entropy controller, and a scripted policy that exploits its reward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.rl_examples import EXAMPLES, section
from xomni_jax.core.config import ConfigError
from xomni_jax.rl.control import Control, EntropyConfig, LossWeights, RestraintConfig, check_control, entropy_coef
from xomni_jax.rl.objectives import GRPOConfig, grpo_loss

COLOUR = "image/colour_entropy"
RESTRAINT = RestraintConfig(((COLOUR, 0.03), ("reward/judge/mean", 0.5)))


@pytest.mark.parametrize("name", section("ent"))
def test_worked_entropy_weights(name):
    e = EXAMPLES[name]
    i = e["inputs"]
    assert EntropyConfig() == EntropyConfig(0.0, None, i["deadband"], i["k"], i["lo"], i["hi"], i["warmup_frac"], i["decay_start_frac"])
    with jax.enable_x64(True):
        coef = entropy_coef(EntropyConfig(i["base"], i["target"]), i["progress"], i["h_norm"])
    np.testing.assert_allclose(coef, e["expected"]["coef"], rtol=0, atol=e["tol"])


def test_weights_in_the_loss(rng):
    """Weights given with an update are those of a configuration that has them, and the bonus has the gradient of the mean entropy."""
    logp, ref, entropy = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(3))
    adv, mask = jnp.asarray(rng.normal(size=4), jnp.float32), jnp.arange(5) < jnp.array([5, 3, 1, 0])[:, None]

    def loss(entropy, cfg, weights):
        return grpo_loss(logp, None, ref, adv, mask, cfg, entropy_BL=entropy, weights=weights)[0]

    plain = GRPOConfig(kl_coef=0.04)
    np.testing.assert_array_equal(loss(entropy, plain, LossWeights(0.4)), loss(entropy, dataclasses.replace(plain, kl_coef=0.4), None))
    slope = jax.grad(loss)(entropy, plain, LossWeights(0.04, 0.5))
    np.testing.assert_allclose(slope, -0.5 * mask / np.maximum(mask.sum(-1, keepdims=True), 1) / 4, rtol=1e-6)
    assert not jax.grad(loss)(entropy, plain, None).any()


def control(**fields):
    return Control(**dict(entropy=EntropyConfig(), restraint=RestraintConfig(), kl_coef=0.02, updates=100, codes=16) | fields)


def test_the_weight_follows_the_entropy_of_the_update_before():
    """From the start of the warm-up on; one update late, so that it is the same in any number of micro-batches."""
    steered = control(entropy=EntropyConfig(2.2e-3, 0.78))
    state = steered.initial()
    for step, share in enumerate([0.78, 0.7, 0.9]):
        _, weights, metrics = steered.before(state, None)
        assert weights.entropy == metrics["control/entropy_coef"] and weights.kl == np.float32(0.02)
        state = steered.after(state, jnp.int32(10 * step + 10), {"grpo/entropy": share * np.log(16)})
        np.testing.assert_allclose(state["entropy_coef"], entropy_coef(steered.entropy, 0.1 * step + 0.1, share), rtol=1e-6)
    assert control().before({}, None) == ({}, None, {}) and control().after({}, jnp.int32(1), {}) == {}
    constant = control(entropy=EntropyConfig(0.01))
    assert constant.initial() == {} and constant.before({}, None)[1] == LossWeights(0.02, np.float32(0.01))


def scripted(restraint, steps=800, noise=0.01):
    """Shares of colour that are left while a policy erases it, faster the less the KL term pulls -> (shares, factors)."""
    rng, follows, lost, out = np.random.default_rng(0), control(restraint=restraint), 0.0, []
    state, before = follows.initial(), jax.jit(follows.before)
    for _ in range(steps):
        signals = jnp.array([5 * (1 - lost) * (1 + noise * rng.normal()), np.nan], jnp.float32)  # the judge never answers
        factor = 1.0
        if restraint.signals:
            state, weights, metrics = before(state, signals)
            factor = float(weights.kl) / 0.02
            assert metrics["control/kl_coef"] == weights.kl
        lost = max(lost + 0.001 - 0.005 * factor * lost, 0.0)
        out.append((1 - lost, factor))
    return np.array(out).T


def test_a_scripted_policy_stops_erasing_colour():
    """Left alone it loses a fifth; restrained, it keeps all but 3%, and the weight is one that it can live with."""
    alone, (kept, factor) = scripted(RestraintConfig()), scripted(RESTRAINT)
    assert alone[0].min() < 0.82 and kept.min() > 0.97
    assert 5 < factor[-50:].mean() < 30 and factor[-50:].std() < 10


def test_the_choice_of_prompts_is_no_fall():
    """A signal that only varies leaves the weights nearly alone, though it varies by more than it may lose."""
    follows, rng = control(restraint=RestraintConfig(((COLOUR, 0.03),))), np.random.default_rng(1)
    state, before, factors = follows.initial(), jax.jit(follows.before), []
    for value in 5 * (1 + 0.08 * rng.normal(size=300)):
        state, weights, _ = before(state, jnp.array([value], jnp.float32))
        factors.append(float(weights.kl) / 0.02)
    assert np.median(factors) == pytest.approx(1.0) and np.mean(factors) < 5


def test_moments_are_those_of_the_first_steps_and_then_running_ones():
    follows, values = control(restraint=RestraintConfig(((COLOUR, 0.03),), settle=4, decay=0.75)), [5.0, 4.0, 6.0, 5.5, 4.5, 3.0]
    state = follows.initial()
    for number, value in enumerate(values, 1):
        state, _, metrics = follows.before(state, jnp.array([value]))
        if number == 4:
            np.testing.assert_allclose(state["restraint"]["variance"], np.var(values[:4]), rtol=1e-6)
            mean, variance = np.mean(values[:4]), np.var(values[:4])
        elif number > 4:
            mean, variance = 0.75 * mean + 0.25 * value, 0.75 * (variance + 0.25 * (value - mean) ** 2)
    held = state["restraint"]
    np.testing.assert_allclose([held["first"][0], held["mean"][0], held["variance"][0]], [np.mean(values[:4]), mean, variance], rtol=1e-6)
    fall = (held["first"][0] - mean - np.sqrt(variance * (1 / 4 + 0.25 / 1.75))) / (0.03 * held["first"][0])
    np.testing.assert_allclose(metrics["control/fall"], fall, rtol=1e-5)


def test_the_weights_return_when_the_signal_does():
    follows = control(restraint=dataclasses.replace(RESTRAINT, settle=2))
    state, factors = follows.initial(), []
    for colour in [5.0] * 2 + [4.0] * 30 + [5.0] * 60:
        state, weights, metrics = follows.before(state, jnp.array([colour, 1.0]))
        factors.append(float(weights.kl) / 0.02)
    assert factors[1] == pytest.approx(1.0) and factors[31] == pytest.approx(100.0) and factors[-1] == pytest.approx(1.0, abs=1e-3)
    held, _, metrics = follows.before(state, jnp.array([np.nan, np.nan]))
    assert np.array_equal(held["restraint"]["mean"], state["restraint"]["mean"]) and np.isfinite(metrics["control/fall"])


@pytest.mark.parametrize(
    "signals, kl_coef, words",
    [
        (
            (("image/colour", 0.03),),
            0.02,
            "image/colour is not measured in this run; name one of image/colour_entropy, image/edge_density, re",
        ),
        ((("reward/judge/mean", 0.03),), 0.02, "reward/judge/mean is not measured"),
        (((COLOUR, 0.03),), 0.0, "config.restraint multiplies config.grpo.kl_coef and config.entropy.coef, which are both 0"),
    ],
)
def test_nonsense_is_refused(signals, kl_coef, words):
    with pytest.raises(ConfigError, match=words):
        check_control(RestraintConfig(signals), kl_coef, ["ocr"])
    check_control(RestraintConfig(), 0.0, ["ocr"])


@pytest.mark.parametrize(
    "fields, words", [(dict(smallest=0.1), "smallest=0.1 is above"), (dict(target=0.5), "target=0.5 steers the weight")]
)
def test_an_entropy_that_cannot_be_steered(fields, words):
    with pytest.raises(ValueError, match=words):
        EntropyConfig(**fields)
