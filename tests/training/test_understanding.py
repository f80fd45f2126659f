"""Understanding losses: what is predicted from what, masking, warm-up, and that the tokenizer learns from them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import meta

from tests.models.siglip_vq_parity import config
from xomni_jax.checkpoint.conversion import flatten
from xomni_jax.models.quantizer import start_codebook
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings
from xomni_jax.training.codebook import skipped_images
from xomni_jax.training.understanding import (
    PRESETS,
    FeatureReader,
    ReaderConfig,
    TokenizerLearner,
    Weights,
    masked_mean,
    tokenizer_loss,
)

READ = ReaderConfig(vocab_size=22, d_model=16, mlp_dim=28, n_heads=4, n_kv_heads=2, head_dim=6, n_layers=2, dense_classes=5)
LEARNER = TokenizerLearner(config(heads=2), READ)


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(4)
    return {
        "pixels": r.uniform(-1, 1, (4, 12, 28, 3)).astype(np.float32),
        "columns": r.integers(0, 5, (4, 3, 7)).astype(np.int32),
        "ids": r.integers(0, 22, (4, 6)).astype(np.int32),
        "loss_mask": np.arange(6)[None] >= np.array([[2], [3], [4], [6]]),
    }


@pytest.fixture(scope="module")
def params(batch):
    init = jax.jit(lambda key: LEARNER.init(key, batch["pixels"], batch["ids"])["params"])
    return meta.unbox(init(jax.random.key(0)))


@jax.jit
def _step(params, batch, key, strength, weights):
    grad, rows = jax.value_and_grad(tokenizer_loss, has_aux=True), with_skip(batch, key, strength)
    return grad(params, rows, rows, learner=LEARNER, strength=strength, weights=weights)


def with_skip(batch, key, strength=1.0):
    """The batch with the images that skip quantisation."""
    return batch | {"skip": skipped_images(key, len(batch["ids"]), LEARNER.vq.skip_probability, strength)}


def step(params, batch, key, strength=1.0, weights=Weights()):
    """((loss, aux), gradients), compiled once for all tests."""
    return _step(params, batch, key, np.float32(strength), jax.tree.map(np.float32, weights))


def losses(*args, **more):
    """(loss, aux)."""
    return step(*args, **more)[0]


def test_reader_is_causal_and_sees_the_image(params, batch):
    # Logits in pieces of 4 positions; compared with all at once below.
    reader = FeatureReader(dataclasses.replace(READ, chunk=4))
    semantics = np.random.default_rng(1).normal(size=(4, 3, 7, 24)).astype(np.float32)
    run = jax.jit(lambda s, ids: reader.apply({"params": params["reader"]}, s, ids)[0])
    base = run(semantics, batch["ids"])
    assert base.shape == (4, 6) and np.all(base <= 0)
    changed = batch["ids"].copy()
    changed[:, 3] = (changed[:, 3] + 1) % 22
    moved = np.abs(run(semantics, changed) - base) > 1e-6
    assert not moved[:, :3].any() and moved[:, 3:].all(axis=0).all()
    bumped = semantics.copy()
    bumped[:, 2, 6] += 1.0
    whole = jax.jit(lambda s, ids: FeatureReader(READ).apply({"params": params["reader"]}, s, ids)[0])
    np.testing.assert_allclose(base, whole(semantics, batch["ids"]), rtol=1e-5, atol=1e-6)
    # Even the first text token is predicted from the image.
    assert np.all(np.abs(run(bumped, batch["ids"])[:, 0] - base[:, 0]) > 1e-6)


def test_loss_is_the_weighted_sum_of_its_terms(params, batch):
    key = jax.random.key(7)
    loss, aux = losses(params, batch, key)
    m = {name: float(value) for name, value in aux.metrics.items()}
    np.testing.assert_allclose(loss, m["loss/answer"] + m["loss/dense"] + m["loss/quantizer"], rtol=1e-6)
    np.testing.assert_allclose(
        m["loss/quantizer"], m["loss/straight_through"] + m["loss/commitment"] + 0.25 * m["loss/codebook"], rtol=1e-6
    )
    weighted, _ = losses(params, batch, key, 0.5, Weights(2.0, 3.0, 4.0))
    half = {name: float(value) for name, value in losses(params, batch, key, 0.5)[1].metrics.items()}
    np.testing.assert_allclose(weighted, 2 * half["loss/answer"] + 3 * half["loss/dense"] + 2 * half["loss/quantizer"], rtol=1e-5)
    assert aux.usage.shape == (19,) and aux.z.shape == (4, 3, 7, 10)
    assert all(value.ndim == 0 for value in aux.metrics.values())


def test_only_answers_and_known_cells_count(params, batch):
    """Unmasked tokens after the answer and unknown cells move no term."""
    key = jax.random.key(7)
    short = batch | {"loss_mask": np.arange(6)[None] < np.array([[3], [2], [1], [3]])}
    other = short | {"ids": np.where(np.arange(6) < 3, batch["ids"], 21 - batch["ids"])}
    a, b = (losses(params, x, key)[1].metrics for x in (short, other))
    np.testing.assert_allclose(a["loss/answer"], b["loss/answer"], rtol=1e-6)
    unknown = losses(params, batch | {"columns": np.full_like(batch["columns"], -1)}, key)[1].metrics
    assert float(unknown["loss/dense"]) == 0.0
    nothing = losses(params, batch | {"loss_mask": np.zeros((4, 6), bool)}, key)[1].metrics
    assert float(nothing["loss/answer"]) == 0.0
    np.testing.assert_allclose(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]), jnp.ones(4)), 0.75)


def test_warm_up_skips_everything_and_leaves_the_codebook_alone(params, batch):
    (_, aux), warm = step(params, batch, jax.random.key(2), 0.0)
    warm = warm["tokenizer"]
    assert not np.any(warm["codebook"]) and np.any(warm["vit"]["patch_embed"]["kernel"])
    assert float(aux.metrics["codes/skipped"]) == 1.0
    assert np.any(step(params, batch, jax.random.key(2), 1.0)[1]["tokenizer"]["codebook"])


def test_without_dense_reading_there_is_no_head(batch):
    learner = TokenizerLearner(config(heads=2), dataclasses.replace(READ, dense_classes=0))
    params = meta.unbox(jax.eval_shape(lambda: learner.init(jax.random.key(0), batch["pixels"], batch["ids"])["params"]))
    assert set(params) == {"tokenizer", "reader"}
    words = {name: value for name, value in with_skip(batch, jax.random.key(0)).items() if name != "columns"}
    loss, aux = jax.eval_shape(lambda p: tokenizer_loss(p, words, words, learner=learner), params)
    assert loss.shape == () and "loss/dense" not in aux.metrics


def test_released_reader_is_qwens():
    d = PRESETS["qwen2.5-1.5b"].decoder
    assert (d.d_model, d.n_layers, d.n_heads * d.head_dim, d.mlp_dim) == (1536, 28, 1536, 8960)
    with pytest.raises(ValueError, match="not a multiple of n_kv_heads"):
        print(ReaderConfig(vocab_size=9, n_heads=4, n_kv_heads=3).decoder)


def test_tokenizer_learns_through_its_codes(params, batch):
    """Warm-up, codebook from outputs, quantised training: codes alone end up carrying the labels of memorised images."""
    opt = optax.adam(3e-3)

    @jax.jit
    def move(params, state, grads):
        updates, state = opt.update(grads, state)
        return optax.apply_updates(params, updates), state

    def train(params, state, key, strength):
        (_, aux), grads = step(params, batch, key, strength)
        return *move(params, state, grads), aux

    state, key = opt.init(params), jax.random.key(1)
    for i in range(40):
        params, state, aux = train(params, state, jax.random.fold_in(key, i), 0.0)
    codebook = start_codebook(key, aux.z.reshape(-1, 10), 19)
    params = params | {"tokenizer": params["tokenizer"] | {"codebook": codebook}}
    first = None
    for i in range(40, 120):
        params, state, aux = train(params, state, jax.random.fold_in(key, i), 1.0)
        first = aux.metrics if first is None else first
    assert aux.metrics["loss/total"] < 0.6 * first["loss/total"]
    assert aux.metrics["accuracy/answer"] > 0.9 and aux.metrics["accuracy/dense"] > 0.5
    assert aux.metrics["codes/used"] > 0.5


def test_every_parameter_splits_by_the_table(batch):
    """fsdp=4, tensor=2: each parameter of the learner names axes that divide; the large ones are split."""
    learner = TokenizerLearner(config(heads=2, codebook_size=22), READ)
    boxed = jax.eval_shape(lambda: learner.init(jax.random.key(0), batch["pixels"], batch["ids"])["params"])
    split = flatten(param_shardings(boxed, make_mesh({"fsdp": 4, "tensor": 2})))
    whole = {path for path, sharding in split.items() if sharding.is_fully_replicated}
    # "bias" and "scale" are vectors; the dense head and the two 1x1 projections are split over their wide side.
    assert all(path.endswith(("bias", "scale")) for path in whole), whole
