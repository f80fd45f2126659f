"""The GRPO update: gradients by hand on a table policy, the real policy on meshes, and rollouts that replay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.miniature import CODES, configs, random_params
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.rl.control import Control, EntropyConfig, RestraintConfig
from xomni_jax.rl.objectives import GRPOConfig
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.rl.update import Policy, grpo_update, loss_and_gradient, make_update
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, SegmentSpec, image_spec
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.guard import GuardConfig
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState, new_state

P, R, T, S = 4, 2, 6, 7
B = P * R


# ---- a policy that is a table of log-probs, and an optimizer that adds the gradient: everything by hand ----
class Table:
    """logp[row], its rows found by the lengths of the prompts."""

    def ready(self, params):
        """There is no head to gather."""
        return params

    def logp(self, params, batch):
        """The rows of the batch, and an entropy."""
        logp_BT = params["logp"][batch.prompts[1]]
        return [(logp_BT, jnp.zeros_like(logp_BT))]


class Descent:
    """params - rate * gradient."""

    decay, average_every = 0.9, 1

    def __init__(self, rate=1.0):
        self.rate = rate

    def trained(self, params):
        """All of them."""
        return params

    def update(self, grads, opt_state, params):
        """As Optimizer's."""
        return jax.tree.map(lambda p, g: p - self.rate * g, params, grads), opt_state, {}

    def schedule(self, step):
        """Constant."""
        return self.rate


def table_batch(rng, ok=None):
    logp_BT = rng.normal(-2, 0.5, (B, T)).astype(np.float32)
    zeros = jnp.zeros((B, T), jnp.int32)
    adv_B, ok_B = rng.normal(size=B).astype(np.float32), np.ones(B, bool) if ok is None else ok
    image = Segment(zeros, None, jnp.array(logp_BT), None, "image", image_spec(T, SamplingConfig()))
    rows = Trajectory((zeros, jnp.arange(B)), (image,), None, (jnp.array(adv_B * ok_B),), (jnp.array(ok_B),))
    return {"logp": jnp.array(logp_BT)}, rows


def drawn_with(rows, logp_BT):
    """The same rows, their only segment drawn with other log-probs."""
    return rows.replace(segments=(rows.segments[0].replace(logp=logp_BT),))


def table_update(params, rows, cfg, micro_batches=1, ref=None, rate=1.0):
    state = TrainState(jnp.int32(0), params, (), {})
    update = functools.partial(grpo_update, Table(), Descent(rate), cfg=cfg, micro_batches=micro_batches)
    return jax.jit(lambda s, r, b: update(s, r, b, key=jax.random.key(1)))(state, ref, rows)


def test_on_policy_gradient_by_hand(rng):
    """-A_i / |o_i| / B for every token, whatever the clip; failed rollouts count in B but not in the sum."""
    ok = np.arange(B) != 3
    params, rows = table_batch(rng, ok)
    state, metrics = table_update(params, rows, GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0))
    gradient_BT = np.asarray(params["logp"] - state.params["logp"])
    np.testing.assert_allclose(
        gradient_BT, np.broadcast_to(-np.asarray(rows.advantage[0])[:, None] * ok[:, None] / T / B, (B, T)), rtol=1e-4, atol=1e-7
    )
    assert not gradient_BT[3].any()
    assert metrics["grpo/ratio_mean"] == 1 and metrics["grpo/clip_frac"] == 0 and metrics["grpo/logp_gap_max"] == 0
    np.testing.assert_allclose(metrics["loss/grpo"], -np.mean(np.asarray(rows.advantage[0]) * ok), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("updates", [1, 2])
def test_another_sampler_is_corrected_by_hand(rng, updates):
    """Each token's gradient counts min(policy / sampler, 2) times; drawn by the policy itself, and without a cap, exactly once."""
    params, rows = table_batch(rng)
    off = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0, updates_per_batch=updates)
    on = dataclasses.replace(off, importance_cap=2.0)
    apart_BT = rng.normal(0, 0.8, (B, T)).astype(np.float32)
    other = drawn_with(rows, params["logp"] - apart_BT)

    def gradient(rows, cfg):
        state, metrics = table_update(params, rows, cfg)
        return np.asarray(params["logp"] - state.params["logp"]), metrics

    plain, told = gradient(rows, off)
    assert "grpo/sampler_kl" not in told
    np.testing.assert_array_equal(gradient(other, off)[0], plain)
    same, told = gradient(rows, on)
    np.testing.assert_array_equal(same, plain)
    assert told["grpo/importance_mean"] == 1 and told["grpo/sampler_kl"] == told["grpo/importance_cut_frac"] == 0
    corrected, told = gradient(other, on)
    weight_BT = np.minimum(np.exp(apart_BT), 2)
    np.testing.assert_allclose(corrected, plain * weight_BT, rtol=1e-5, atol=5e-7)  # a difference of two parameters of at most 4 in float32
    np.testing.assert_allclose(told["grpo/importance_mean"], weight_BT.mean(), rtol=1e-5)
    np.testing.assert_allclose(told["grpo/importance_cut_frac"], (np.exp(apart_BT) > 2).mean(), rtol=1e-5)


def test_gradient_of_the_kl_term_by_hand(rng):
    params, rows = table_batch(rng)
    rows = rows.replace(advantage=(jnp.zeros(B),))
    ref = {"logp": params["logp"] + jnp.array(rng.normal(0, 0.3, (B, T)), jnp.float32)}
    state, metrics = table_update(params, rows, GRPOConfig(rollouts_per_prompt=R, kl_coef=0.5), ref=ref)
    d_BT = np.asarray(ref["logp"] - params["logp"], np.float64)
    np.testing.assert_allclose(params["logp"] - state.params["logp"], 0.5 * (1 - np.exp(d_BT)) / T / B, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(metrics["grpo/kl"], np.mean(np.exp(d_BT) - d_BT - 1), rtol=1e-4)


@pytest.mark.parametrize("reduction", ["grpo", "dapo"])
def test_micro_batches_equal_one_batch(rng, reduction):
    params, rows = table_batch(rng, np.arange(B) % 3 != 1)
    ref = {"logp": params["logp"] + 0.1}
    cfg = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.1, reduction=reduction)
    (one, m1), (four, m4) = table_update(params, rows, cfg, 1, ref), table_update(params, rows, cfg, 4, ref)
    np.testing.assert_allclose(four.params["logp"], one.params["logp"], rtol=1e-6)
    for name in ("loss/grpo", "grpo/policy_loss", "grpo/logp_gap_max", "grpo/kl_max", "grpo/ratio_max"):
        np.testing.assert_allclose(m4[name], m1[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_several_updates_reuse_the_batch_and_clip(rng):
    """Four minibatches of two rows: each row is used once, against the log-probs from before the first."""
    params, rows = table_batch(rng)
    cfg = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0, updates_per_batch=4)
    state, metrics = table_update(params, rows, cfg)
    assert state.step == 4
    # With B rows one update would divide by B; with four minibatches each divides by B / 4.
    expected_BT = -np.asarray(rows.advantage[0])[:, None] / T / (B / 4) * np.ones(T)
    np.testing.assert_allclose(params["logp"] - state.params["logp"], expected_BT, rtol=1e-4, atol=1e-6)
    assert metrics["grpo/clip_frac"] == 0 and metrics["grpo/logp_gap_max"] == 0


def test_a_policy_that_moved_too_far_is_clipped(rng):
    """All rows share one log-prob, so every update moves all: from the second on the ratio leaves the clip range and nothing moves."""

    class Shared(Table):
        def logp(self, params, batch):
            logp_BT = jnp.broadcast_to(params["logp"], (len(batch.prompts[1]), T))
            return [(logp_BT, jnp.zeros_like(logp_BT))]

    _, rows = table_batch(rng)
    rows = drawn_with(rows.replace(advantage=(jnp.ones(B),)), jnp.full((B, T), -1.0))
    state = TrainState(jnp.int32(0), {"logp": jnp.float32(-1.0)}, (), {})
    cfg = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0, updates_per_batch=4, clip_high=0.2)
    state, metrics = grpo_update(Shared(), Descent(0.5), state, None, rows, cfg, 1, jax.random.key(0))
    # The first update has the gradient -1, so the log-prob rises by 0.5: ratio e^0.5 > 1.2 in the three that follow.
    np.testing.assert_allclose(state.params["logp"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["grpo/clip_frac"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(metrics["grpo/ratio_max"], np.exp(0.5), rtol=1e-5)
    assert metrics["grpo/logp_gap_max"] == 0  # of the first update, before anything moved


def test_the_gap_is_that_of_scored_rollouts(rng):
    params, rows = table_batch(rng, np.arange(B) != 2)
    rows = drawn_with(rows, rows.segments[0].logp.at[2].add(9.0).at[5, 1].add(-0.25))
    _, metrics = table_update(params, rows, GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0), 2)
    np.testing.assert_allclose(metrics["grpo/logp_gap_max"], 0.25, rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_reference_may_be_the_average_of_the_policy(rng, updates):
    """That of before the update, for all of its minibatches; the average itself then moves on."""
    params, rows = table_batch(rng)
    ema = {"logp": params["logp"] + 0.2}
    cfg = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.5, updates_per_batch=updates)
    control = Control(EntropyConfig(), RestraintConfig(), 0.5, 10, 4)
    given = jnp.asarray(rows.advantage[0]).reshape(P, R)
    update = make_update(Table(), Descent(), cfg, lambda reward, ok: (reward, {}), control, 1, average=True)
    state, metrics = update(
        TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), (), {}), None, rows, jnp.zeros((P, R)), given, jax.random.key(1)
    )
    assert metrics["grpo/kl"] == 0  # without an average the policy stands for it
    start = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), (), {}, jax.tree.map(jnp.copy, ema))
    state, metrics = update(start, None, rows, jnp.zeros((P, R)), given, jax.random.key(1))
    wanted, theirs = table_update(params, rows, cfg, ref=ema)
    assert not np.array_equal(state.ema["logp"], ema["logp"])
    np.testing.assert_allclose(metrics["grpo/kl"], theirs["grpo/kl"], rtol=1e-6)
    np.testing.assert_allclose(state.params["logp"], wanted.params["logp"], rtol=1e-6)


# ---- the real policy ----
CONFIG = dataclasses.replace(configs()["transformer"], n_head_layers=0)
MODEL = ARTransformer(CONFIG)
CFG = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.05)
PLAIN = SamplingConfig(top_k=0, min_p=0.0)
EVERYTHING = SamplingConfig(temperature=0.8, top_k=9, min_p=0.02, guidance=1.5)
OPTIMIZER = Optimizer(OptimizerConfig(1e-3, warmup_steps=0, schedule="constant"), 10)


@pytest.fixture(scope="module")
def params():
    """Policy and reference."""
    return random_params("transformer", CONFIG, 1), random_params("transformer", CONFIG, 2)


def rollouts(params, sampling, *more):
    """A batch drawn by the policy, an image and `more` segments, with advantages that a service might have led to."""
    rng = np.random.default_rng(3)
    ids_PS, lengths_P = rng.integers(0, 384, (P, S)).astype(np.int32), np.array([7, 3, 5, 1], np.int32)
    negative = (np.full((1, 2), 3, np.int32), np.array([2], np.int32)) if sampling.guided else None
    keys_PR = jax.vmap(lambda k: jax.random.split(k, R))(jax.random.split(jax.random.key(5), P))

    def draw(params):
        engine, specs = Engine(MODEL), (image_spec(T, sampling), *more)
        prompt, state = engine.start(params, (ids_PS, lengths_P), R, sum(spec.length for spec in specs), negative)
        segments = []
        for spec in specs:
            state, segment = engine.sample(params, prompt, state, spec, keys_PR, sampling.truncates)
            segments.append(segment.rows())
        return tuple(segments)

    segments = jax.tree.map(np.asarray, jax.jit(draw)(params))
    repeat = lambda x: np.repeat(x, R, axis=0)  # noqa: E731
    advantage, ok = (rng.normal(size=B).astype(np.float32) for _ in segments), np.ones(B, bool)
    negative = negative and tuple(np.repeat(x, B, axis=0) for x in negative)
    return Trajectory((repeat(ids_PS), repeat(lengths_P)), segments, negative, tuple(advantage), (ok,) * len(segments))


@pytest.fixture(scope="module")
def plain(params):
    """Rollouts without truncation or guidance."""
    return rollouts(params[0], PLAIN)


@functools.cache
def updater(cfg, micro_batches):
    """The jitted update; its state is not donated, so that a test may go on using it."""
    return jax.jit(lambda s, r, b: grpo_update(Policy(MODEL, 0), OPTIMIZER, s, r, b, cfg, micro_batches, jax.random.key(2)))


def learn(params, batch, cfg=CFG):
    """One update on one device -> (state, metrics)."""
    state = TrainState(jnp.int32(0), params[0], OPTIMIZER.transform.init(params[0]), {})
    return updater(cfg, 1)(state, params[1], batch)


@pytest.fixture(scope="module")
def alone(params, plain):
    """The update on one device."""
    return learn(params, plain)


# In two micro-batches, each of which is spread over the mesh again.
def test_a_mesh_learns_what_one_device_learns(params, plain, alone):
    mesh, micro_batches = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), 2
    with jax.set_mesh(mesh):
        state = new_state(lambda: init_params("transformer", CONFIG, jax.random.key(0)), OPTIMIZER, mesh, GuardConfig())[0]()
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        state, ref = state.replace(params=jax.device_put(params[0], shardings)), jax.device_put(params[1], shardings)
        state, metrics = updater(CFG, micro_batches)(state, ref, plain)

    wanted, wanted_metrics = alone
    assert metrics.keys() == wanted_metrics.keys()
    for name in metrics:
        # The gap is nothing but rounding; all others agree.
        atol = 1e-5 if name == "grpo/logp_gap_max" else 1e-7
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=2e-5, atol=atol, err_msg=name)
    # Adam's first moments are the gradients; beside the largest of a parameter, rounding of the others is nothing.
    leaves = list(zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(wanted.opt_state), strict=True))
    assert len(leaves) > 2 * len(jax.tree.leaves(params[0]))
    for x, y in leaves:
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6 * np.abs(y).max(initial=0))
    # Adam divides by the gradient's size: where that is near zero, rounding shows in the step of 1e-3.
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4)

    kernel = state.params["language"]["mlp"]["gate_proj"]["kernel"]  # [layers, embed, mlp]
    assert kernel.sharding.spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    shape = (1, 32 // mesh.shape["fsdp"], 48 // 2)
    assert kernel.addressable_shards[0].data.shape == shape
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2 and all(x.sharding.shard_shape(x.shape) == shape for x in moments)
    assert metrics["loss/grpo"].sharding.is_fully_replicated


def test_the_sampler_replays(alone, params):
    """Rollouts with temperature, truncation and guidance give the trainer the log-probs the sampler had."""
    assert alone[1]["grpo/logp_gap_max"] < 1e-4
    batch = rollouts(params[0], EVERYTHING)
    assert (np.unpackbits(batch.segments[0].kept, axis=-1, count=CODES).sum(-1) <= 9).all()
    state, metrics = learn(params, batch, GRPOConfig(rollouts_per_prompt=R, kl_coef=0.05, updates_per_batch=2))
    assert metrics["grpo/logp_gap_max"] < 1e-4 and state.step == 2
    assert np.isfinite([float(x) for x in metrics.values()]).all()


def test_a_rollout_without_a_reward_has_no_influence(params, plain):
    ok = np.arange(B) != 5
    ours, image = plain.replace(ok=(ok,), advantage=(plain.advantage[0] * ok,)), plain.segments[0]
    other = image.replace(ids=np.where(ok[:, None], image.ids, 0), logp=np.where(ok[:, None], image.logp, -50))
    assert not np.array_equal(image.ids, other.ids)
    theirs = ours.replace(segments=(other,))
    (a, m), (b, n) = learn(params, ours), learn(params, theirs)
    for x, y in zip(jax.tree.leaves((a.params, m)), jax.tree.leaves((b.params, n)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_gradient_from_beside_is_added_in_every_update(rng):
    params, rows = table_batch(rng)
    cfg = GRPOConfig(rollouts_per_prompt=R, kl_coef=0.0, updates_per_batch=2)
    more = lambda params: ({"logp": jnp.full((B, T), 0.25)}, {"loss/sft": jnp.float32(3.0)})  # noqa: E731
    state, rows = TrainState(jnp.int32(0), params, (), {}), rows.replace(advantage=(jnp.zeros(B),))
    state, metrics = grpo_update(Table(), Descent(), state, None, rows, cfg, 1, jax.random.key(1), beside=more)
    np.testing.assert_allclose(state.params["logp"], params["logp"] - 2 * 0.25, rtol=1e-6)
    assert metrics["loss/sft"] == 3.0


def test_segments_add_up(params):
    """The update of an image and a ragged text is that of the sum of two losses, each with its own advantages and normalisation."""
    text = SegmentSpec("text", "text", 5, PLAIN, tuple(range(0, 384, 3)))
    batch = rollouts(params[0], PLAIN, text)
    lengths_B = batch.segments[1].lengths
    assert len(set(lengths_B.tolist())) > 1
    cfg = dataclasses.replace(CFG, kl_coef=0.0)
    _, _, metrics = both = loss_of(params[0], batch, cfg)

    def plain_loss(params):
        score = Engine(MODEL).score(params, batch.prompts, batch.segments, chunk=0)
        total = 0.0
        for (logp_BL, _), adv_B, mask_BL in zip(score, batch.advantage, (np.ones((B, T), bool), np.arange(5) < lengths_B[:, None])):
            ratio_BL = jnp.exp(logp_BL - jax.lax.stop_gradient(logp_BL))
            total -= jnp.mean(jnp.sum(jnp.where(mask_BL, ratio_BL * adv_B[:, None], 0), -1) / np.sum(mask_BL, -1))
        return total

    value, grads = jax.jit(jax.value_and_grad(plain_loss))(params[0])
    np.testing.assert_allclose(both[0], value, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(both[1]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6 * max(np.abs(y).max(), 1e-3))
    assert metrics["grpo/logp_gap_max"] < 1e-4 and np.abs(grads["lm_head"]["kernel"]).max() > 0


def loss_of(params, batch, cfg):
    """(loss, gradient, metrics) in two micro-batches."""
    grads, metrics = jax.jit(lambda p: loss_and_gradient(Policy(MODEL, 0), p, (batch, None, None), cfg, 2))(params)
    return metrics["loss/grpo"], grads, metrics
