"""Group advantages against worked numbers, and their invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.rl_examples import EXAMPLES
from xomni_jax.rl import advantages
from xomni_jax.rl.advantages import AdvantageConfig

_jitted = jax.jit(advantages.group_advantages, static_argnums=2, compiler_options={"xla_backend_optimization_level": 0})


def group_advantages(reward_PR, ok_PR, cfg=AdvantageConfig()):
    """Jitted, as in a trainer; back as numpy."""
    return jax.tree.map(np.asarray, _jitted(reward_PR, ok_PR, cfg))


def config(inputs: dict, **more) -> AdvantageConfig:
    return AdvantageConfig(ddof=inputs.get("std_ddof", 1), eps=inputs.get("eps", 1e-4), **more)


def weighted(inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum over the rewards that apply, [P, R], and where there is any."""
    reward = np.array(inputs["rewards"], float)
    total = np.nansum(reward * np.array(inputs.get("weights", [1.0] * reward.shape[1])), axis=-1)
    return total.reshape(-1, inputs["group_size"]), ~np.isnan(reward).all(-1).reshape(-1, inputs["group_size"])


@pytest.mark.parametrize("name", ["adv-01", "adv-02", "adv-03", "adv-04", "adv-05", "adv-06", "adv-08", "xomni-01"])
def test_worked_numbers(name):
    e = EXAMPLES[name]
    reward_PR, ok_PR = weighted(e["inputs"])
    with jax.enable_x64(True):
        adv_PR, _ = group_advantages(reward_PR, ok_PR, config(e["inputs"], scale=e["inputs"].get("scale", "group")))
    np.testing.assert_allclose(adv_PR.ravel(), e["expected"]["advantages"], atol=e["tol"], rtol=e["tol"])
    if "total" in e["expected"]:
        np.testing.assert_allclose(reward_PR.ravel(), e["expected"]["total"], rtol=1e-12)


@pytest.mark.parametrize("name", ["adv-09", "adv-10"])
def test_worked_numbers_of_flow_grpo(name):
    e = EXAMPLES[name]
    reward_PR = np.array(e["inputs"]["rewards"]).reshape(2, 3)
    cfg = config(e["inputs"], scale="batch" if e["inputs"]["global_std"] else "group")
    with jax.enable_x64(True):
        adv_PR, _ = group_advantages(reward_PR, np.ones((2, 3), bool), cfg)
        clamped_PR, _ = group_advantages(reward_PR, np.ones((2, 3), bool), AdvantageConfig(ddof=0, scale=cfg.scale, clip=0.7))
    np.testing.assert_allclose(adv_PR.ravel(), e["expected"]["advantages"], rtol=e["tol"], atol=e["tol"])
    np.testing.assert_allclose(clamped_PR.ravel(), np.clip(e["expected"]["advantages"], -0.7, 0.7), rtol=1e-9)


def test_tunix_variants(rng):
    """`rloo`: minus the mean of the others, no deviation. `drgrpo`: centred only."""
    reward_PR = rng.normal(size=(3, 5)).astype(np.float32)
    ok_PR = np.ones((3, 5), bool)
    rloo_PR, _ = group_advantages(reward_PR, ok_PR, AdvantageConfig(baseline="rloo", scale="none"))
    others_PR = (reward_PR.sum(-1, keepdims=True) - reward_PR) / 4
    np.testing.assert_allclose(rloo_PR, reward_PR - others_PR, atol=1e-6)
    centred_PR, _ = group_advantages(reward_PR, ok_PR, AdvantageConfig(scale="none"))
    np.testing.assert_allclose(centred_PR, reward_PR - reward_PR.mean(-1, keepdims=True), atol=1e-6)


def test_sum_is_zero_and_deviation_is_one(rng):
    reward_PR = rng.normal(size=(4, 7))
    with jax.enable_x64(True):
        adv_PR, _ = group_advantages(reward_PR, np.ones((4, 7), bool))
        doubled_PR, _ = group_advantages(2 * reward_PR, np.ones((4, 7), bool))
    np.testing.assert_allclose(adv_PR.sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose(adv_PR.std(-1, ddof=1), 1 / (1 + 1e-4 / reward_PR.std(-1, ddof=1)), rtol=1e-12)
    np.testing.assert_allclose(doubled_PR, adv_PR, rtol=1e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "rloo"])
def test_unknown_rewards_take_no_part(rng, scale, baseline):
    """Masked rollouts get 0, and the others get what they would in a group without them."""
    reward_PR = rng.normal(size=(2, 6)).astype(np.float32)
    ok_PR = np.array([[1, 0, 1, 1, 0, 1]] * 2, bool)
    cfg = AdvantageConfig(scale=scale, baseline=baseline)
    adv_PR, metrics = group_advantages(np.where(ok_PR, reward_PR, np.nan), ok_PR, cfg)
    small_PR, _ = group_advantages(reward_PR[:, ok_PR[0]], np.ones((2, 4), bool), cfg)
    np.testing.assert_allclose(adv_PR[:, ok_PR[0]], small_PR, atol=1e-6)
    assert (adv_PR[:, ~ok_PR[0]] == 0).all()
    assert metrics["grpo/unscored_frac"] == pytest.approx(1 / 3)


def test_a_nan_reward_counts_as_unknown():
    adv_PR, metrics = group_advantages(jnp.array([[1.0, jnp.nan, 3.0]]), jnp.ones((1, 3), bool))
    assert adv_PR[0, 1] == 0 and np.isfinite(adv_PR).all() and metrics["grpo/unscored_frac"] == pytest.approx(1 / 3)


def test_groups_without_signal_are_exactly_zero_and_counted():
    """Equal rewards, a single known reward, none at all; only the last group has a signal."""
    reward_PR = np.array([[0.3, 0.3, 0.3], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.2, 0.4]], np.float32)
    ok_PR = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    for scale in ("group", "batch", "none"):
        adv_PR, metrics = group_advantages(reward_PR, ok_PR, AdvantageConfig(scale=scale))
        assert (adv_PR[:3] == 0).all() and (adv_PR[3] != 0).all()
        assert metrics["grpo/flat_group_frac"] == 0.75


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("scale", "world", "scale='world' is unknown"),
        ("baseline", "median", "baseline='median' is unknown"),
    ],
)
def test_nonsense_is_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        AdvantageConfig(**{field: value})
