"""T5 and CLIP text encoders: parity with transformers, pooling, sharding, refusals."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import name_tables
from tests.models import golden
from tests.parity import reference_clip, reference_t5
from xomni_jax.checkpoint.names import clip, t5
from xomni_jax.models.text_encoders import CLIP_PRESETS, T5_PRESETS, CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder, relative_buckets
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

T5 = T5Config(**reference_t5.SIZES)
CLIP = CLIPTextConfig(**reference_clip.SIZES)


def _compare(arrays, model, table, loss, names, zero=()) -> None:
    wanted = golden.shapes(model, arrays["in/ids"])
    params = name_tables.to_params(golden.part(arrays, "w"), table, wanted)

    def scalar(params):
        out = model.apply({"params": params}, arrays["in/ids"])
        return loss(out), out

    gradients, out = jax.jit(jax.grad(scalar, has_aux=True))(params)
    for name, value in zip(names, out if isinstance(out, tuple) else (out,)):
        golden.assert_close(value, arrays[f"out/{name}"], name)
    golden.assert_gradients(gradients, golden.part(arrays, "grad"), table, wanted, zero=zero)


def compare_t5(arrays: dict[str, np.ndarray]) -> None:
    """Hidden states and every gradient against a reference's arrays."""
    _compare(arrays, T5Encoder(T5), t5.table(T5), lambda hidden: jnp.sum(hidden * arrays["in/cotangent"]), ["hidden"])


def compare_clip(arrays: dict[str, np.ndarray]) -> None:
    """Hidden and pooled states and every gradient against a reference's arrays."""

    def loss(out):
        return jnp.sum(out[0] * arrays["in/cotangent"]) + jnp.sum(out[1] * arrays["in/pooled_cotangent"])

    _compare(arrays, CLIPTextEncoder(CLIP), clip.table(CLIP), loss, ["hidden", "pooled"], zero=("k_proj/bias",))


def test_golden_t5():
    compare_t5(golden.load("t5"))


def test_golden_clip():
    compare_clip(golden.load("clip"))


@pytest.mark.parametrize(
    "model, table, count",
    [
        (T5Encoder(T5_PRESETS["t5-v1.1-xxl"]), t5.table, 4_762_310_656),
        (T5Encoder(T5_PRESETS["tiny"]), t5.table, None),
        (CLIPTextEncoder(CLIP_PRESETS["clip-l"]), clip.table, 123_060_480),
        (CLIPTextEncoder(CLIP_PRESETS["tiny"]), clip.table, None),
    ],
    ids=["t5-v1.1-xxl", "t5-tiny", "clip-l", "clip-tiny"],
)
def test_presets_fit_their_table_and_shard(model, table, count):
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32)))["params"]
    wanted = {k: v.shape for k, v in name_tables.flatten(nn.meta.unbox(boxed)).items()}
    rules = table(model.cfg)
    assert name_tables.plan(name_tables.stand_ins(rules, wanted), rules, wanted)
    if count:  # the released models' published sizes
        assert sum(np.prod(s, dtype=np.int64) for s in wanted.values()) == count
    param_shardings(boxed, make_mesh(dict(fsdp=4, tensor=2)))


def test_known_keys_without_use():
    assert name_tables.to_params(
        {k: v for k, v in golden.part(golden.load("t5"), "w").items()} | {"encoder.embed_tokens.weight": np.zeros(1)},
        t5.table(T5),
        golden.shapes(T5Encoder(T5), np.zeros((1, 3), np.int32)),
    )
    unprefixed = {k.removeprefix("text_model."): v for k, v in golden.part(golden.load("clip"), "w").items()}
    wanted = golden.shapes(CLIPTextEncoder(CLIP), np.zeros((1, 3), np.int32))
    assert name_tables.to_params(unprefixed | {"embeddings.position_ids": np.arange(11)}, clip.table(CLIP, prefix=""), wanted)


def test_relative_buckets_by_hand():
    buckets = relative_buckets(200, 32, 128)
    assert buckets[5, 5] == 0 and buckets[5, 4] == 1 and buckets[5, 6] == 17  # keys ahead take the upper half
    assert buckets[7, 0] == 7 and buckets[8, 0] == 8 and buckets[11, 0] == 8 and buckets[12, 0] == 9  # logarithmic from 8 on
    assert buckets[199, 0] == 15 and buckets[0, 199] == 31  # everything from 128 on is alike


def test_clip_is_causal_and_pools_at_first_end():
    arrays = golden.load("clip")
    model, ids = CLIPTextEncoder(CLIP), arrays["in/ids"]
    params = name_tables.to_params(golden.part(arrays, "w"), clip.table(CLIP), golden.shapes(model, ids))
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    changed = ids.copy()
    changed[0, 6:] = 3  # behind the first end-of-text token
    (hidden, pooled), (_, after) = (run(params, i) for i in (ids, changed))
    np.testing.assert_allclose(after, pooled, rtol=1e-5)
    np.testing.assert_array_equal(pooled, np.stack([hidden[0, 4], hidden[1, 7]]))


def test_refusals():
    with pytest.raises(ValueError, match="12 tokens, the model has 11 positions"):
        CLIPTextEncoder(CLIP).init(jax.random.key(0), np.zeros((1, 12), np.int32))
    with pytest.raises(ValueError, match="does not divide into n_heads=4"):
        CLIPTextConfig(d_model=15, n_heads=4)
    with pytest.raises(ValueError, match="outside the vocabulary of 21"):
        CLIPTextConfig(vocab_size=21)
    with pytest.raises(ValueError, match="t5.n_buckets=30 must be a multiple of 4"):
        T5Config(n_buckets=30)
