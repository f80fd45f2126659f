"""Schedules, the freeze table, weight decay, clipping and Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.core.config import ConfigError
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import PRESETS
from xomni_jax.sharding.abstract import path_name
from xomni_jax.training.optimizer import PHASES, Optimizer, OptimizerConfig, decays, learning_rate


def small_params() -> dict:
    return {
        "old": {"kernel": jnp.array([[1.5, -0.0], [0.25, 3.0]]), "bias": jnp.array([0.5, -2.0])},
        "new": {"kernel": jnp.array([[1.0, 2.0, -3.0]]), "norm": {"scale": jnp.array([1.0, 4.0])}},
    }


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def trained(optimizer, params):
    """Paths of the parameters that are trained."""
    return [path_name(path) for path, kind in jax.tree_util.tree_leaves_with_path(optimizer.labels(params)) if kind == "train"]


def one_update(optimizer, params, grads):
    """The first update, jitted as in a trainer."""
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.transform.init(p), p))(params, grads)


@pytest.mark.parametrize(
    "schedule, expected",  # updates 0, 3 (end of warm-up), 4 (first after it), 9 (middle), 14 (end), 20 (past it)
    [
        ("constant", [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 1.0, 1.0, 0.6, 0.2, 0.2]),
        ("cosine", [0.25, 1.0, 1.0, 0.6, 0.2, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    lr = learning_rate(OptimizerConfig(1.0, warmup_steps=4, schedule=schedule, final_fraction=0.2), steps=14)
    np.testing.assert_allclose([float(lr(jnp.int32(i))) for i in (0, 3, 4, 9, 14, 20)], expected, rtol=1e-6)


def test_first_update_by_hand():
    """AdamW's first step is lr x (sign of the gradient + decay x p): the bias corrections cancel."""
    cfg = OptimizerConfig(0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    params = small_params()
    grads = jax.tree.map(lambda x: jnp.where(x < 0, -3.0, 2.0), params)
    new, _, _ = one_update(Optimizer(cfg, 10), params, grads)
    for (path, p), n, g in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(new), jax.tree.leaves(grads)):
        decay = 0.5 if path_name(path).endswith("kernel") else 0.0
        np.testing.assert_allclose(n, p - 0.1 * (jnp.sign(g) + decay * p), atol=1e-6, err_msg=path_name(path))


def test_norms_and_biases_do_not_decay():
    shapes = jax.eval_shape(lambda: init_params("transformer", PRESETS["tiny"], jax.random.key(0)))
    for path, decay in jax.tree_util.tree_leaves_with_path(decays(shapes)):
        assert decay == (path_name(path).rsplit("/", 1)[-1] not in ("scale", "bias")), path_name(path)


def test_rates_by_path_first_match_first():
    params = small_params()
    grads = jax.tree.map(lambda x: x + 0.5, params)
    plain, fast = (
        one_update(
            Optimizer(OptimizerConfig(0.01, warmup_steps=0, schedule="constant", rates=rates), 5, freeze=["old/bias"]), params, grads
        )[0]
        for rates in ((), ((".*/scale", 7.0), ("new/.*", 3.0), (".*/bias", 9.0)))
    )
    moved = {
        name: (fast[a][b] - params[a][b]) / (plain[a][b] - params[a][b])
        for name, a, b in (("kernel", "new", "kernel"), ("old", "old", "kernel"))
    }
    np.testing.assert_allclose([float(jnp.mean(moved[name])) for name in ("kernel", "old")], [3.0, 1.0], rtol=1e-4)
    gain = lambda tree: tree["new"]["norm"]["scale"] - params["new"]["norm"]["scale"]  # noqa: E731
    np.testing.assert_allclose(gain(fast), 7 * gain(plain), rtol=1e-4)
    np.testing.assert_array_equal(fast["old"]["bias"], params["old"]["bias"])  # frozen all the same


def test_frozen_parameters_stay_and_hold_no_moments():
    """Bit for bit, negative zero included, whatever the gradient; also when it is NaN."""
    params = small_params()
    optimizer = Optimizer(OptimizerConfig(0.1, weight_decay=0.3), 10, train=("new/.*",))
    state = jax.eval_shape(optimizer.transform.init, params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == [2, 2, 3, 3], "two moments of new/kernel and new/norm/scale, and nothing of old"
    grads = ones(params)
    grads["old"]["kernel"] *= jnp.nan
    new, _, metrics = one_update(optimizer, params, grads)
    for name in ("kernel", "bias"):
        assert np.asarray(new["old"][name]).tobytes() == np.asarray(params["old"][name]).tobytes()
    for x, y in zip(jax.tree.leaves(new["new"]), jax.tree.leaves(params["new"])):
        assert (x != y).all()
    np.testing.assert_allclose(metrics["optim/grad_norm"], 5**0.5, rtol=1e-6)
    assert all(np.isfinite(v) for v in metrics.values())
    assert trained(optimizer, params) == ["new/kernel", "new/norm/scale"]


def test_freeze_wins_over_train():
    optimizer = Optimizer(OptimizerConfig(0.1), 10, train=("new/.*",), freeze=(".*/scale",))
    assert trained(optimizer, small_params()) == ["new/kernel"]


def test_clipping_is_by_the_norm_of_what_learns():
    """With clip_norm equal to the trained norm nothing changes; the first Adam moment shows the scale."""
    params = small_params()
    grads = jax.tree.map(lambda x: 2.0 * jnp.ones_like(x), params)
    for clip, scale in ((0.0, 1.0), (2 * 5**0.5, 1.0), (5**0.5, 0.5)):
        optimizer = Optimizer(OptimizerConfig(0.1, clip_norm=clip), 10, train=("new/.*",))
        _, state, _ = one_update(optimizer, params, grads)
        moments = [x for p, x in jax.tree_util.tree_leaves_with_path(state) if path_name(p).endswith("mu/new/kernel")]
        np.testing.assert_allclose(moments[0], 0.1 * 2.0 * scale, rtol=1e-5)


def test_gradients_of_frozen_parameters_are_not_computed():
    """Nothing may use them: in the first pre-training stage that saves a third of the language layers' work."""
    params = {"frozen": jnp.ones((64, 64)), "learns": jnp.ones((64, 64))}

    def flops(train):
        optimizer = Optimizer(OptimizerConfig(0.1), 10, train=train)

        def step(params, state, x):
            grads = jax.grad(lambda p: jnp.sum((jnp.tanh(x @ p["learns"]) @ p["frozen"]) ** 2))(params)
            return optimizer.update(grads, state, params)

        lowered = jax.jit(step).lower(params, optimizer.transform.init(params), jnp.ones((512, 64)))
        return lowered.compile().cost_analysis()["flops"]

    matmul = 2 * 512 * 64 * 64
    assert flops((".*",)) - flops(("learns",)) > 0.9 * matmul


def test_the_named_phases_are_parameters_of_the_transformer():
    """Stage 1 trains the vision layers and the image embedding, norm and head, all of them and nothing else."""
    shapes = jax.eval_shape(lambda: init_params("transformer", PRESETS["tiny"], jax.random.key(0)))
    for patterns in PHASES.values():
        for pattern in patterns:
            assert trained(Optimizer(OptimizerConfig(1.0), 1, train=(pattern,)), shapes), pattern
    tops = {name.split("/")[0] for name in trained(Optimizer(OptimizerConfig(1.0), 1, train=("vision",)), shapes)}
    assert tops == {"adapters", "heads", "mm_embed", "mm_norm", "mm_head"}
    assert set(dict(shapes)) - tops == {"language", "lm_embed", "lm_norm", "lm_head"}
    assert len(trained(Optimizer(OptimizerConfig(1.0), 1, train=("all",)), shapes)) == len(jax.tree.leaves(shapes))


def newton_schulz(x: np.ndarray, steps: int = 5) -> np.ndarray:
    """The quintic iteration towards the orthogonal factor, for a matrix with no more rows than columns."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x


def test_muon_by_hand():
    """The first update: kernels of the stacks are orthogonalised per layer, over all heads at once; the rest moves by
    Adam with Nesterov's momentum."""
    rng = np.random.default_rng(0)
    shapes = {
        "language": {
            "attn": {"q_proj": {"kernel": (2, 5, 3, 4), "bias": (2, 3, 4)}, "o_proj": {"kernel": (2, 3, 2, 7)}},
            "attn_norm": {"scale": (2, 5)},
        },
        "mm_head": {"kernel": (5, 6)},
    }
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params, grads = (jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(2))
    cfg = OptimizerConfig(0.1, name="muon", warmup_steps=0, schedule="constant", clip_norm=0.0)
    new, _, _ = one_update(Optimizer(cfg, 10), params, grads)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, new, params)

    for name, rows, columns in (("q_proj", 5, 12), ("o_proj", 6, 7)):
        got, grad = moved["language"]["attn"][name]["kernel"], grads["language"]["attn"][name]["kernel"]
        for layer in range(2):
            # float32 against float64, five cubic steps: 1e-4 of the largest entry.
            expected = -0.1 * 0.2 * np.sqrt(columns) * newton_schulz(grad[layer].reshape(rows, columns).astype(np.float64))
            np.testing.assert_allclose(got[layer].reshape(rows, columns), expected, atol=1e-4 * np.abs(expected).max())
    for pick in (
        lambda t: t["mm_head"]["kernel"],
        lambda t: t["language"]["attn_norm"]["scale"],
        lambda t: t["language"]["attn"]["q_proj"]["bias"],
    ):
        # Nesterov's first step, debiased: (b1 m2 + (1 - b1) g) / sqrt(g^2) with m2 = (1 - b1) g / (1 - b1^2).
        expected = -0.1 * np.sign(pick(grads)) * (0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9))
        np.testing.assert_allclose(pick(moved), expected, rtol=1e-5)


@pytest.mark.parametrize("key", ["optimizer.rates", "train", "freeze"])
@pytest.mark.parametrize(
    "pattern, words",
    [
        ("new", "'new' matches no parameter; the nearest paths are new/kernel, "),
        ("older/kernel", "'older/kernel' matches no parameter; the nearest paths are old/kernel, "),
        ("new/(kernel", r"'new/\(kernel' is no regular expression \(missing \), .*write one such as"),
    ],
)
def test_a_pattern_for_nothing_is_refused(key, pattern, words):
    """A typing error in a pattern would go unnoticed."""
    given = {"rates": ((".*/kernel", 2.0), (pattern, 2.0))} if key == "optimizer.rates" else {}
    chosen = {key: (".*/scale", pattern)} if not given else {}
    with pytest.raises(ConfigError, match=f"^config.{key}: {words}"):
        Optimizer(OptimizerConfig(**given), 5, **chosen).labels(small_params())


def test_training_nothing_is_refused():
    with pytest.raises(
        ConfigError, match="config.train=.'new/.*',., config.freeze=.'.*/kernel', '.*scale'.: no parameter is left to train"
    ):
        Optimizer(OptimizerConfig(0.1), 10, train=("new/.*",), freeze=(".*/kernel", ".*scale")).transform.init(small_params())


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(name="sgd"), "name='sgd' is unknown; use one of adamw, muon"),
        (dict(schedule="step"), "schedule='step' is unknown"),
    ],
)
def test_nonsense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**({"learning_rate": 0.1} | fields))
