"""The GRPO objective: worked values and gradients, exact micro-batching, masks, and a policy that learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.rl_examples import EXAMPLES, section
from xomni_jax.rl.advantages import group_advantages
from xomni_jax.rl.objectives import REDUCTIONS, GRPOConfig, grpo_loss, importance, join_metrics, kl_estimate, loss_items

OFF = GRPOConfig(updates_per_batch=2)  # off-policy: old log-probs are given


def example_config(inputs: dict) -> GRPOConfig:
    cispo = inputs["loss_type"] == "cispo"
    return GRPOConfig(
        clip_low=inputs.get("eps_lo", 0.2),
        clip_high=0.2 if cispo else inputs.get("eps_hi", 0.2),
        ratio_cap=inputs["eps_hi"] if cispo else 5.0,
        kl_coef=inputs.get("beta", 0.0),
        ratio=inputs.get("level", "token"),
        reduction=inputs["loss_type"],
        delta=inputs.get("delta"),
        max_length=inputs.get("max_len"),
    )


# Little arrays: compiling is what costs, so it is done once per set of configurations and without optimisation.
@functools.partial(jax.jit, static_argnames="cfgs", compiler_options={"xla_backend_optimization_level": 0})
def _results(arrays, cfgs):
    f = jax.value_and_grad(grpo_loss, has_aux=True)
    return [f(*a[:5], cfg, *a[5:]) for a, cfg in zip(arrays, cfgs)]


def evaluate(cases) -> list:
    """(loss, gradient, metrics) in float64 of each (logp, old, ref, adv, mask, cfg, n_items)."""
    with jax.enable_x64(True):
        arrays = [[None if a is None else np.asarray(a, np.float64) for a in (*case[:5], *case[6:])] for case in cases]
        results = _results(arrays, tuple(case[5] for case in cases))
        return [(loss, grad, metrics) for (loss, metrics), grad in jax.tree.map(np.asarray, results)]


def batch(rng):
    """Six rollouts of up to five tokens, log-probs near one another, ragged masks, the last row empty."""
    logp = rng.normal(-1.5, 0.7, size=(6, 5))
    old, ref = logp + rng.normal(0, 0.25, size=logp.shape), logp + rng.normal(0, 0.25, size=logp.shape)
    mask = np.arange(5) < np.array([5, 3, 1, 5, 2, 0])[:, None]
    return logp, old, ref, rng.normal(size=6), mask


@pytest.fixture(scope="module")
def worked() -> dict:
    """Our results for every worked loss."""
    cases = {}
    for name in section("loss"):
        i = EXAMPLES[name]["inputs"]
        cases[name] = (i["logp"], i["old_logp"], i.get("ref"), i["advantages"], i["mask"], example_config(i), i.get("n_items"))
    for name in section("seqratio"):
        i = EXAMPLES[name]["inputs"]
        cfg = GRPOConfig(ratio="trajectory", kl_coef=i["beta"], clip_low=i["eps"], clip_high=i["eps"])
        cases[name] = (i["logp"], i["old_logp"], i["ref_logp"], i["advantages"], i["mask"], cfg, None)
    return dict(zip(cases, evaluate(list(cases.values()))))


@pytest.mark.parametrize("name", section("loss") + section("seqratio"))
def test_worked_loss_and_gradient(name, worked):
    e, (loss, grad, _) = EXAMPLES[name], worked[name]
    np.testing.assert_allclose(loss, e["expected"]["loss"], rtol=e["tol"], atol=e["tol"])
    np.testing.assert_allclose(grad, e["expected"]["grad_wrt_logp"], rtol=e["tol"], atol=e["tol"])


@pytest.mark.parametrize("name", section("seqratio"))
def test_worked_trajectory_ratio(name, worked):
    """Equation 1 read literally: the product ratio, and the KL summed over tokens."""
    e, (_, _, metrics) = EXAMPLES[name], worked[name]
    np.testing.assert_allclose(metrics["grpo/ratio_max"], max(e["expected"]["ratio"]), rtol=e["tol"])
    np.testing.assert_allclose(metrics["grpo/ratio_mean"], np.mean(e["expected"]["ratio"]), rtol=e["tol"])
    kl_sum = metrics["grpo/kl"] * np.sum(e["inputs"]["mask"])
    np.testing.assert_allclose(kl_sum, np.sum(e["expected"]["kl_seq_sum"]), rtol=e["tol"])


@pytest.mark.parametrize("name", section("kl"))
def test_worked_kl_estimates(name):
    e = EXAMPLES[name]
    with jax.enable_x64(True):
        logp, ref = (jnp.array(e["inputs"][k]) for k in ("logp", "ref_logp"))
        for k in ("k1", "k2", "k3"):
            np.testing.assert_allclose(kl_estimate(logp, ref, k), e["expected"][k], rtol=e["tol"], atol=e["tol"])
        slope = jax.grad(lambda x: kl_estimate(x, ref, "k3").sum())(logp)
    np.testing.assert_allclose(slope, e["expected"]["dk3_dlogp"], rtol=e["tol"], atol=e["tol"])


def test_the_sampler_kl_is_exact_in_expectation(rng):
    """Over all tokens, each as often as the sampler draws it, the estimate is KL(sampler || policy); the masked have no part in it."""
    sampler, policy = (np.exp(rng.normal(size=7)) for _ in range(2))
    sampler, policy = sampler / sampler.sum(), policy / policy.sum()
    told = [importance(np.log([[p, np.nan]]), np.log([[s, 1.0]]), np.array([[True, False]]), 2.0)[1] for s, p in zip(sampler, policy)]
    kl = sum(s * each["grpo/sampler_kl"] for s, each in zip(sampler, told))
    np.testing.assert_allclose(kl, np.sum(sampler * np.log(sampler / policy)), rtol=1e-5)
    with pytest.raises(ValueError, match="importance_cap=2 weighs tokens; ratio='sequence' has one weight per rollout, use 'token'"):
        GRPOConfig(importance_cap=2.0, ratio="sequence")


def test_expected_kl_gradients():
    """k2 pulls along the reverse KL and k3 along the forward one; with the importance weight k1 and k3 give the reverse."""
    i, want = EXAMPLES["klgrad-01"]["inputs"], EXAMPLES["klgrad-01"]["expected"]
    logp_V, ref_V = (np.array(z) - np.log(np.sum(np.exp(z))) for z in (i["logits"], i["ref_logits"]))
    wanted = {
        ("k2", False): ("expected_grad_k2", "grad_reverse_kl"),
        ("k3", False): ("expected_grad_k3", "grad_forward_kl"),
        ("k1", True): ("grad_reverse_kl",),
        ("k3", True): ("grad_reverse_kl",),
    }
    cfgs = [GRPOConfig(kl_coef=1.0, kl_estimator=k, kl_importance=importance) for k, importance in wanted]
    # One rollout of one token per vocabulary entry; n_items = 1 leaves each its own d loss / d logp.
    results = evaluate([(logp_V[:, None], None, ref_V[:, None], np.zeros(4), np.ones((4, 1)), cfg, 1) for cfg in cfgs])
    for names, (_, slope_V1, _) in zip(wanted.values(), results):
        weighted_V = np.exp(logp_V) * slope_V1[:, 0]
        by_logits_V = weighted_V - np.exp(logp_V) * weighted_V.sum()
        for name in names:
            np.testing.assert_allclose(by_logits_V, want[name], rtol=1e-9)


def test_k1_alone_has_no_expected_gradient():
    i = EXAMPLES["klgrad-01"]["inputs"]
    with jax.enable_x64(True):
        logits, ref = jnp.array(i["logits"]), jax.nn.log_softmax(jnp.array(i["ref_logits"]))
        chance = jax.nn.softmax(logits)
        grad = jax.grad(lambda z: jnp.sum(chance * kl_estimate(jax.nn.log_softmax(z), ref, "k1")))(logits)
    np.testing.assert_allclose(np.asarray(grad), EXAMPLES["klgrad-01"]["expected"]["expected_grad_k1"], atol=1e-12)


def test_on_policy_gradient_and_metrics(rng):
    """Value -mean(A), gradient -A m / |o| / B: a test of the value alone could not see a broken trainer."""
    logp, _, _, adv, mask = batch(rng)
    cfg = GRPOConfig(kl_coef=0.0)
    results = evaluate([(logp, old, None, adv, mask, cfg, None) for old in (None, logp)])
    for loss, grad, metrics in results:
        np.testing.assert_allclose(loss, -np.sum(adv * mask.any(-1)) / 6, rtol=1e-12)
        np.testing.assert_allclose(grad, -adv[:, None] * mask / np.maximum(mask.sum(-1, keepdims=True), 1) / 6, rtol=1e-12)
        assert metrics["grpo/ratio_mean"] == 1 and metrics["grpo/clip_frac"] == 0 and metrics["grpo/logp_gap_max"] == 0
        assert "grpo/kl" not in metrics


def test_metrics_by_hand():
    log_ratio = np.array([[0.5, -0.5, 9.0], [0.1, -0.4, 0.3]])
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    logp = np.full((2, 3), -1.0)
    with jax.enable_x64(True):
        args = (jnp.asarray(logp), logp - log_ratio, logp + 0.1, np.array([1.0, -1.0]), mask)
        _, metrics = jax.jit(lambda *a: grpo_loss(*a, OFF, entropy_BL=jnp.full((2, 3), 0.7)))(*args)
    ratios = np.exp(log_ratio[mask])
    np.testing.assert_allclose(metrics["grpo/ratio_mean"], ratios.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["grpo/ratio_max"], ratios.max(), rtol=1e-12)
    np.testing.assert_allclose(metrics["grpo/clip_frac"], 2 / 5)  # A > 0 at 0.5; A < 0 at -0.4; not A > 0 at -0.5
    np.testing.assert_allclose(metrics["grpo/logp_gap_max"], 0.5)
    np.testing.assert_allclose([metrics["grpo/kl"], metrics["grpo/kl_max"]], np.expm1(0.1) - 0.1, rtol=1e-9)
    np.testing.assert_allclose(metrics["grpo/entropy"], 0.7)


# Every distinct reduction once: bnpo, dapo and token-mean are one.
ALL = [dataclasses.replace(OFF, reduction=r, max_length=9) for r in REDUCTIONS if r not in ("bnpo", "token-mean")] + [
    dataclasses.replace(OFF, ratio="sequence"),
    dataclasses.replace(OFF, ratio="trajectory"),
    dataclasses.replace(OFF, kl_importance=True, delta=1.5),
]


def evaluate_all(arrays, n_items=None) -> list:
    return evaluate([(*arrays, cfg, n) for cfg, n in zip(ALL, n_items or [None] * len(ALL))])


def test_micro_batches_add_up(rng):
    """With the window's divisor, losses and gradients of a split sum to those of the whole batch, for every reduction."""
    arrays = batch(rng)
    n_items = [np.asarray(loss_items(arrays[-1], cfg)) for cfg in ALL]
    halves = [evaluate_all(half, n_items) for half in zip(*(np.split(a, 2) for a in arrays))]
    for cfg, (whole, whole_grad, whole_metrics), first, second in zip(ALL, evaluate_all(arrays), *halves, strict=True):
        np.testing.assert_allclose(first[0] + second[0], whole, rtol=1e-12, err_msg=str(cfg))
        np.testing.assert_allclose(np.concatenate([first[1], second[1]]), whole_grad, rtol=1e-12, atol=1e-15, err_msg=str(cfg))
        joined = join_metrics({k: jnp.stack([first[2][k], second[2][k]]) for k in whole_metrics})
        for k in ("grpo/kl_max", "grpo/ratio_max", "grpo/logp_gap_max", "grpo/policy_loss"):
            np.testing.assert_allclose(joined[k], whole_metrics[k], rtol=1e-6, err_msg=str(cfg))


def test_masked_positions_have_no_influence(rng):
    """They, and padding on the right, may hold anything, inf and NaN too: the loss is the same and their gradient is 0."""
    logp, old, ref, adv, mask = batch(rng)
    rubbish = [np.where(mask, a, x) for a, x in zip((logp, old, ref), (-np.inf, np.nan, np.inf))]
    wide = [np.pad(a, ((0, 0), (0, 2)), constant_values=x) for a, x in zip(rubbish, (np.nan, -np.inf, np.inf))]
    clean = evaluate_all((logp, old, ref, adv, mask))
    padded = evaluate_all((*wide, adv, np.pad(mask, ((0, 0), (0, 2)))))
    for cfg, (loss, grad, metrics), (same_loss, same_grad, same_metrics) in zip(ALL, clean, padded, strict=True):
        np.testing.assert_allclose(same_loss, loss, rtol=1e-12, err_msg=str(cfg))
        np.testing.assert_allclose(same_grad, np.pad(grad, ((0, 0), (0, 2))), rtol=1e-12, atol=1e-15, err_msg=str(cfg))
        assert (grad[~mask] == 0).all()
        for k in metrics:
            np.testing.assert_allclose(same_metrics[k], metrics[k], rtol=1e-12, err_msg=f"{k}, {cfg}")


def test_reductions_by_hand(rng):
    """Divisors of every reduction, on losses that the ratio leaves at -A."""
    _, _, _, adv, mask = batch(rng)
    tokens, logp = mask.sum(-1), np.full(mask.shape, -1.0)
    want = {
        "grpo": -np.sum(adv * (tokens > 0)) / 6,
        "bnpo": -np.sum(adv * tokens) / tokens.sum(),
        "dr_grpo": -np.sum(adv * tokens) / (6 * 9),
        "dapo": -np.sum(adv * tokens) / tokens.sum(),
        "cispo": np.sum(adv * tokens) / tokens.sum(),  # log pi = -1
        "token-mean": -np.sum(adv * tokens) / tokens.sum(),
        "sequence-mean-token-mean": -np.sum(adv * (tokens > 0)) / 5,
        "sequence-mean-token-scale": -np.sum(adv * tokens) / 9 / 5,
        "seq-mean-token-sum": -np.sum(adv * tokens) / 5,
        "sequence-mean-token-sum-norm": -np.sum(adv * tokens) / 6,
    }
    assert set(want) == set(REDUCTIONS)
    cases = [(logp, None, None, adv, mask, GRPOConfig(reduction=name, max_length=9, kl_coef=0.0), None) for name in want]
    for (name, value), (loss, _, _) in zip(want.items(), evaluate(cases)):
        np.testing.assert_allclose(loss, value, rtol=1e-12, err_msg=name)


def test_advantages_of_tokens(rng):
    """An advantage for every token is that of the rollout where all agree; the trajectory's one clipped term takes one of a rollout."""
    logp, old, ref, adv, mask = batch(rng)
    spread = np.where(mask, adv[:, None], np.nan)
    several = [cfg for cfg in ALL if cfg.ratio != "trajectory"]
    for one, each in zip(*(evaluate([(logp, old, ref, a, mask, cfg, None) for cfg in several]) for a in (adv, spread)), strict=True):
        np.testing.assert_allclose(each[0], one[0], rtol=1e-12)
        np.testing.assert_allclose(each[1], one[1], rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="takes one advantage per rollout"):
        grpo_loss(logp, old, ref, spread, mask, GRPOConfig(ratio="trajectory"))


def test_same_length_images_make_the_common_reductions_equal(rng):
    logp, old, ref, adv, _ = batch(rng)
    cfgs = [dataclasses.replace(OFF, reduction=r) for r in ("grpo", "bnpo", "dapo")]
    losses = [loss for loss, _, _ in evaluate([(logp, old, ref, adv, np.ones((6, 5)), cfg, None) for cfg in cfgs])]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)


def test_delta_is_the_dual_clip(rng):
    """Tunix's epsilon_c caps the loss of a bad rollout at -epsilon_c A: the same number as `delta`."""
    logp, old, _, _, _ = batch(rng)
    old = logp - 3 * np.abs(logp - old)
    adv = -np.abs(rng.normal(size=6))
    cfg = dataclasses.replace(OFF, kl_coef=0.0, delta=1.5)
    ((loss, _, metrics),) = evaluate([(logp, old, None, adv, np.ones((6, 5)), cfg, None)])
    ratio = np.exp(logp - old)
    clipped = np.maximum(-ratio * adv[:, None], -np.clip(ratio, 0.8, 1.2) * adv[:, None])
    np.testing.assert_allclose(loss, np.minimum(clipped, -1.5 * adv[:, None]).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["grpo/clip_frac"], (ratio > 1.5).mean(), rtol=1e-12)


def test_far_apart_policies_stay_finite():
    """Log-ratios are clamped: exp overflows neither in the ratio nor in k3, in float32; bfloat16 is raised to that."""
    cfgs = (OFF, dataclasses.replace(OFF, ratio="trajectory"))

    @jax.jit
    def results(logp, old):
        f = jax.value_and_grad(grpo_loss, has_aux=True)
        return [f(logp, old, old, jnp.array([-1.0]), jnp.ones((1, 2)), cfg) for cfg in cfgs]

    for leaf in jax.tree.leaves(results(jnp.full((1, 2), -500.0, jnp.float32), jnp.full((1, 2), -1.0))):
        assert np.isfinite(leaf).all()
    (loss, _), _ = jax.eval_shape(results, jax.ShapeDtypeStruct((1, 2), jnp.bfloat16), jnp.zeros((1, 2)))[0]
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("estimator", ["k2", "k3"])  # k1 is a metric: its slope is the same everywhere
def test_a_policy_far_from_the_reference_is_pulled_back(estimator):
    """Beyond the cap as well, on both sides, however far; and bit for bit the plain estimate up to it."""
    logp = jnp.array([-1.0, -19.0, -25.0, -60.0, -300.0])
    for sign in (1.0, -1.0):  # the policy gives less to the tokens than the reference, then more
        d = sign * (-0.5 - logp)
        slope = jax.grad(lambda x: kl_estimate(x, logp + d, estimator).sum())(logp)
        assert np.isfinite(slope).all() and (np.sign(slope) == -sign).all()
    near = jnp.linspace(-19.9, 19.9, 41)
    np.testing.assert_array_equal(kl_estimate(-near, jnp.zeros(41), "k3"), jnp.expm1(near) - near)


@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
def test_a_bad_token_that_became_far_more_likely_is_pushed_down(ratio):
    """The ratio beyond the cap: the clip leaves a negative advantage its gradient, and so must the cap."""
    old, mask, bad = jnp.full((1, 2), -90.0), jnp.ones((1, 2), bool), jnp.array([-1.0])
    cfg = GRPOConfig(kl_coef=0.0, ratio=ratio)
    slope = jax.grad(lambda logp: grpo_loss(logp, old, None, bad, mask, cfg)[0])(jnp.full((1, 2), -1.0))
    assert np.isfinite(slope).all() and (np.asarray(slope) > 0).all()


def test_only_the_policy_receives_a_gradient(rng):
    logp, old, ref, adv, mask = (jnp.asarray(a) for a in batch(rng))
    grads = jax.jit(jax.grad(lambda o, r, a: grpo_loss(logp, o, r, a, mask, OFF)[0], argnums=(0, 1, 2)))(old, ref, adv)
    assert all((np.asarray(g) == 0).all() for g in grads)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(kl_estimator="k4"), "kl_estimator='k4' is unknown; use one of k1, k2, k3"),
        (dict(kl_estimator="k1"), "zero expected gradient"),
        (dict(ratio="word"), "ratio='word' is unknown"),
        (dict(reduction="sum"), "reduction='sum' is unknown"),
        (dict(ratio="trajectory", reduction="dapo"), "ratio='trajectory'"),
        (dict(delta=1.1), "delta=1.1 must lie above"),
        (dict(reduction="dr_grpo"), "divides by max_length"),
    ],
)
def test_nonsense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        GRPOConfig(**fields)


def test_k1_is_allowed_as_a_metric(rng):
    logp, _, ref, adv, mask = batch(rng)
    cfg = GRPOConfig(kl_coef=0.0, kl_estimator="k1")
    ((_, _, metrics),) = evaluate([(logp, None, ref, adv, mask, cfg, None)])
    np.testing.assert_allclose(metrics["grpo/kl"], (logp - ref)[mask].mean(), rtol=1e-12)


def bandit(kl_coef: float, steps: int = 100) -> tuple[np.ndarray, float]:
    """Mean rewards per step, and the final KL, of a 4-token policy over 8 tokens rewarded for its share of token 3."""
    cfg = GRPOConfig(kl_coef=kl_coef)
    reference_LV = jnp.zeros((4, 8))

    def token_logp(z_LV, token_BL):
        return jnp.take_along_axis(jax.nn.log_softmax(z_LV)[None], token_BL[..., None], -1)[..., 0]

    def step(z_LV, noise_BLV):
        token_BL = jnp.argmax(z_LV + noise_BLV, -1)  # a Gumbel draw
        reward_PR = jnp.mean(token_BL == 3, -1).reshape(4, 16)
        adv_PR, _ = group_advantages(reward_PR, jnp.ones((4, 16), bool))

        def loss(z):
            ref_BL = token_logp(reference_LV, token_BL)
            return grpo_loss(token_logp(z, token_BL), None, ref_BL, adv_PR.ravel(), jnp.ones((64, 4)), cfg)[0]

        return z_LV - 4.0 * jax.grad(loss)(z_LV), reward_PR.mean()

    noise = np.random.default_rng(0).gumbel(size=(steps, 64, 4, 8)).astype(np.float32)
    z_LV, rewards = jax.lax.scan(step, reference_LV, noise)
    logp_LV = jax.nn.log_softmax(z_LV)
    return np.asarray(rewards), float(jnp.sum(jnp.exp(logp_LV) * (logp_LV - jax.nn.log_softmax(reference_LV)), -1).mean())


def test_a_bandit_learns_and_the_kl_term_holds_it():
    rewards, kl = bandit(kl_coef=0.0)
    assert rewards[0] < 0.2 and rewards[-5:].mean() > 0.9 and kl > 1.2
    _, held = bandit(kl_coef=1.0)
    assert held < 0.5
