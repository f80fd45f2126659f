"""Micro-batches add up to the batch, in every supervised stage, however unevenly their tokens are spread."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests.miniature import CODES, GRID, SIZE, configs, random_params, stage_config
from xomni_jax.models.registry import COMPONENTS
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, Decoder
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS
from xomni_jax.training import decoder, pretrain, tokenizer
from xomni_jax.training.accumulate import gradient, join_rows, split_rows
from xomni_jax.training.next_token import PackedTargets
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState

B = 4
OPTIMIZER = Optimizer(OptimizerConfig(1e-2, warmup_steps=0, schedule="constant", clip_norm=0.0), 10)


def test_a_masked_mean_by_hand(rng):
    """d/dw of sum(m (w x - t)^2) / sum(m), with three, one, none and two targets in the rows."""
    x, t = rng.normal(size=(2, 4, 3))
    mask = np.array([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], bool)

    def loss(w, rows):
        x, t, part = rows
        error = jnp.where(part, (w * x - t) ** 2, 0.0)
        return jnp.sum(error) / np.sum(mask), {"n": jnp.sum(part), "rows": error}

    join = lambda aux: {"n": jnp.sum(aux["n"], 0), "rows": join_rows(aux["rows"])}  # noqa: E731
    for parts in (1, 2, 4):
        got, aux, value = gradient(loss, jnp.float32(0.3), (x, t, mask), parts, join)
        np.testing.assert_allclose(got, np.sum(mask * 2 * (0.3 * x - t) * x) / 6, rtol=1e-5)
        np.testing.assert_allclose(value, np.sum(mask * (0.3 * x - t) ** 2) / 6, rtol=1e-5)
        np.testing.assert_allclose(aux["rows"], mask * (0.3 * x - t) ** 2, rtol=1e-5)
        assert int(aux["n"]) == 6
    np.testing.assert_array_equal(join_rows(split_rows(x, 2)), x)


def next_token_case(rng):
    """Rows with very different numbers of targets of each kind, one without any text."""
    cfg, ar, length, room = stage_config("sft", "unused"), configs()["transformer"], 12, 8
    ids = rng.integers(0, 384 + CODES, (B, length)).astype(np.int32)
    positions, segments = np.tile(np.arange(length, dtype=np.int32), (B, 1)), np.ones((B, length), np.int32)
    at = np.tile(np.arange(room, dtype=np.int32), (B, 1))
    text, image = (np.arange(room) < np.array(n)[:, None] for n in ([1, 8, 0, 3], [8, 0, 5, 1]))
    kinds = (at, rng.integers(0, 384, (B, room)).astype(np.int32), text), (at, rng.integers(0, CODES, (B, room)).astype(np.int32), image)
    batch = PackedTargets(ids, positions, segments, *kinds[0], *kinds[1])
    params, net = random_params("transformer", ar, 0), COMPONENTS["transformer"].module(ar)
    return cfg, params, lambda c: pretrain.make_update(net, OPTIMIZER, c), (None, batch)


def decoder_case(rng):
    """Noise, its level and dropped conditions are drawn for the whole batch."""
    cfg = stage_config("decoder", "unused", "decoder.drop_condition=0.5")
    parts = {name: random_params(name, configs()[name], 1) for name in DECODER_COMPONENTS}
    modules = Decoder(*(COMPONENTS[name].module(configs()[name]) for name in DECODER_COMPONENTS))
    vq, vq_params = IMAGE_TOKENIZERS["siglip_vq"](configs()["siglip_vq"]), random_params("siglip_vq", configs()["siglip_vq"], 2)
    text, pooled = (rng.integers(1, 300, (B, n)).astype(np.int32) for n in (32, 16))
    batch = {"pixels": rng.uniform(-1, 1, (B, *SIZE, 3)).astype(np.float32), "text": text, "pooled": pooled}
    batch["empty"] = np.zeros((1, 32), np.int32), np.zeros((1, 16), np.int32)
    make = lambda c: decoder.make_update(modules, vq, OPTIMIZER, c)  # noqa: E731
    return cfg, parts, make, (None, vq_params, batch, jax.random.key(3))


def tokenizer_case(rng):
    """Answers and labels of different lengths; some images skip quantisation, and codes are counted over all."""
    cfg = stage_config("tokenizer", "unused")
    models = {name: getattr(cfg, name).config() for name in ("siglip_vq", "reader")}
    learner = tokenizer.make_learner(models)
    shapes = jax.eval_shape(lambda: tokenizer.init_params(learner, 0, SIZE))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), meta.unbox(shapes))
    batch = {
        "pixels": rng.uniform(-1, 1, (B, *SIZE, 3)).astype(np.float32),
        "columns": np.where(np.arange(B)[:, None, None] < 1, -1, rng.integers(0, 5, (B, *GRID))).astype(np.int32),
        "ids": rng.integers(1, 300, (B, 9)).astype(np.int32),
        "loss_mask": np.arange(9) < np.array([1, 9, 0, 4])[:, None],
    }
    make = lambda c: tokenizer.make_update(learner, OPTIMIZER, c.tokenizer, c.accumulate)  # noqa: E731
    return cfg, params, make, (batch, jax.random.key(5), jnp.float32(0.6))


@pytest.mark.parametrize("case", [next_token_case, decoder_case, tokenizer_case])
def test_micro_batches_learn_what_the_batch_learns(case, rng):
    cfg, params, make, args = case(rng)
    results = []
    for parts in (1, 2):
        extra = {"usage": jnp.full(CODES, 1.0 / CODES)} if case is tokenizer_case else {}
        state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, params), OPTIMIZER.transform.init(params), extra)
        results.append(jax.tree.map(np.asarray, make(dataclasses.replace(cfg, accumulate=parts))(state, *args)))
    whole, pieces = results
    assert whole[1].keys() == pieces[1].keys()
    for name, value in whole[1].items():
        if name in ("optim/update_norm", "optim/param_norm"):
            continue  # Adam's first step is the sign of a gradient, also of one that is zero but for rounding
        np.testing.assert_allclose(pieces[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    # The moments of the first step are the gradients; the parameters themselves move by their signs.
    for a, b in zip(jax.tree.leaves(whole[0].opt_state), jax.tree.leaves(pieces[0].opt_state), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-6 * max(1.0, float(np.abs(a).max())))
    for a, b in zip(whole[2:], pieces[2:], strict=True):  # the tokenizer's encoder outputs, in the order of the batch
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
