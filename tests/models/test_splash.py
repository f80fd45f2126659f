"""The TPU attention kernel: its numbers in interpret mode, and that it compiles for every supported generation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.topologies import tpu_mesh
from xomni_jax.models.attention import attend
from xomni_jax.models.registry import init_params
from xomni_jax.models.splash import BLOCKS, LANES, block_of
from xomni_jax.models.transformer import PRESETS, ARTransformer
from xomni_jax.sharding.mesh import make_mesh


def qkv(rng, rows: int, length: int, heads: int, kv_heads: int, width: int):
    return tuple(jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, kv_heads, kv_heads))


def both(mesh, arrays, real, **kw):
    """(output, gradients of q, k, v) of the two implementations; `real` [B, L] marks rows that count."""

    def run(kind):
        def loss(q, k, v):
            y = attend(q, k, v, scale=0.25, kind=kind, **kw)
            return jnp.sum(jnp.where(real[:, :, None, None], jnp.sin(y), 0.0)), y

        with jax.set_mesh(mesh):
            (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return [np.where(real[:, :, None, None], y, 0.0), *grads]

    return run("splash"), run("plain")


def segments(*lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


CASES = {
    # Packed rows with padding behind (0), grouped queries, a length that is padded to a block.
    "packed": dict(
        heads=4, kv_heads=2, length=200, causal=True, segments_BL=np.stack([np.roll(segments(20, 90, 90), -20), np.ones(200, int)])
    ),
    "full, padded": dict(heads=2, kv_heads=2, length=150, causal=False),
}


@pytest.mark.parametrize("mesh", [{}, dict(data=2, tensor=2)], ids=["one device", "data 2 x tensor 2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_plain_forward_and_backward(rng, case, mesh):
    kw = dict(case)
    heads, kv_heads, length = (kw.pop(name) for name in ("heads", "kv_heads", "length"))
    mesh = make_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    if "segments_BL" in kw:
        kw["segments_BL"] = jnp.asarray(kw["segments_BL"], jnp.int32)
    real = np.asarray(kw["segments_BL"]) > 0 if "segments_BL" in kw else np.ones((2, length), bool)
    got, expected = both(mesh, qkv(rng, 2, length, heads, kv_heads, 24), real, **kw)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    for a, b in zip(got[1:], expected[1:]):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_pad_little():
    assert [block_of(n) for n in (3, 128, 300, 1024)] == [128, 128, 384, 1024]
    for length in range(1025, 20_000, 97):
        block = block_of(length)
        assert block in BLOCKS and block % LANES == 0
        padded = -(-length // block) * block
        assert padded < 1.25 * length and all(padded <= -(-length // other) * other for other in BLOCKS)
    assert -(-5696 // block_of(5696)) * block_of(5696) == 5760  # 512 tokens of text and 72 x 72 codes


def test_the_transformer_takes_either(rng):
    """Vision layers, packed rows and rotary positions included."""
    cfg = dataclasses.replace(PRESETS["tiny"], n_language_layers=1, d_model=64, mlp_dim=96)
    params = init_params("transformer", cfg, jax.random.key(0))
    ids = jnp.asarray(rng.integers(0, cfg.total_vocab_size, (2, 40)), jnp.int32)
    segments_BL = jnp.asarray(np.stack([np.roll(segments(4, 16, 20), -4)] * 2), jnp.int32)

    def run(kind):
        model = ARTransformer(dataclasses.replace(cfg, attention=kind))
        with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
            return jax.jit(lambda p: model.apply({"params": p}, ids, None, segments_BL))(
                jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
            )

    real = np.asarray(segments_BL) > 0
    np.testing.assert_allclose(np.asarray(run("splash"))[real], np.asarray(run("plain"))[real], atol=2e-5)


@pytest.mark.parametrize(
    "topology, causal",
    [("v5e:2x2", True), ("v5p:2x2x1", True), ("v6e:2x2", True), ("v6e:2x2", False)],
    ids=["transformer-v5e", "transformer-v5p", "transformer-v6e", "mmdit-v6e"],
)
def test_compiles_for_every_generation(topology, causal):
    mesh = tpu_mesh(topology, tensor=4)
    heads, kv_heads, rows, length = (28, 4, 1, 5696) if causal else (24, 24, 2, 5696)
    shapes = [jax.ShapeDtypeStruct((rows, length, n, 128), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def gradients(q, k, v, ids):
        return jax.grad(
            lambda *qkv: jnp.sum(attend(*qkv, scale=0.1, kind="auto", causal=causal, segments_BL=ids).astype(jnp.float32)), (0, 1, 2)
        )(q, k, v)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).trace(*shapes, ids).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
    # Scores never reach memory: for one head they alone would take length^2 x 4 bytes.
    assert compiled.memory_analysis().temp_size_in_bytes < heads // 4 * rows * length**2
