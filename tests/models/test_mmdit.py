"""MMDiT: parity with diffusers, start of training, mesh independence, refusals."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import name_tables
from tests.models import golden
from tests.parity.reference_mmdit import GRID, SIZES
from xomni_jax.checkpoint.names.mmdit import table
from xomni_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig, apply_rope, rope_tables
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import map_rows, param_shardings

CFG = MMDiTConfig(d_model=SIZES["n_heads"] * SIZES["head_dim"], **{k: v for k, v in SIZES.items() if k != "head_dim"})


def compare(arrays: dict[str, np.ndarray], cfg: MMDiTConfig = CFG) -> None:
    """Velocity with and without semantics, and every gradient, against a reference's arrays."""
    model, x = MMDiT(cfg), golden.part(arrays, "in")
    inputs = (x["latents"], x["sigma"], x["text"], x["pooled"], GRID)
    wanted = golden.shapes(model, *inputs)
    params = name_tables.to_params(golden.part(arrays, "w"), table(cfg), wanted)

    def loss(params):
        velocity = model.apply({"params": params}, *inputs, x["semantics"], x["guidance"])
        return jnp.sum(velocity * x["cotangent"]), velocity

    gradients, velocity = jax.jit(jax.grad(loss, has_aux=True))(params)
    golden.assert_close(velocity, arrays["out/velocity"], "velocity")
    golden.assert_gradients(gradients, golden.part(arrays, "grad"), table(cfg), wanted)
    plain = jax.jit(lambda p: model.apply({"params": p}, *inputs, guidance_B=x["guidance"]))(params)
    golden.assert_close(plain, arrays["out/velocity_without_semantics"], "velocity without semantics")


def test_golden():
    compare(golden.load("mmdit"))


def _random(cfg: MMDiTConfig, grid=(3, 4), B=4, S=5, seed=0):
    """Inputs, boxed parameter shapes, and parameters away from their zero start."""
    rng, T = np.random.default_rng(seed), grid[0] * grid[1]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    sigma_B = rng.uniform(size=B).astype(np.float32)
    inputs = (
        normal(B, T, cfg.in_channels),
        sigma_B,
        normal(B, S, cfg.text_dim),
        normal(B, cfg.pooled_dim),
        grid,
        normal(B, T, cfg.semantic_dim),
    )
    boxed = jax.eval_shape(lambda: MMDiT(cfg).init(jax.random.key(0), *inputs))["params"]
    return inputs, boxed, jax.tree.map(lambda leaf: 0.1 * normal(*leaf.shape), nn.meta.unbox(boxed))


SMALL = MMDiTConfig(
    in_channels=12, d_model=32, n_heads=4, axes_dims=(2, 2, 4), n_double=1, n_single=2, text_dim=10, pooled_dim=6, semantic_dim=14
)


@jax.jit
def _step(params, arrays, target):
    """((loss, velocity), gradients) of SMALL on a 3 x 4 grid."""
    latents, sigma, text, pooled, semantics = arrays

    def loss(params):
        velocity = map_rows(
            lambda x: MMDiT(SMALL).apply({"params": params}, *x[:4], (3, 4), x[4]), (latents, sigma, text, pooled, semantics)
        )
        return jnp.mean((velocity - target) ** 2), velocity

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("rows", [4, 8], ids=["split over heads", "spread over all devices"])
def test_mesh_does_not_change_velocity_or_gradients(rows):
    inputs, boxed, params = _random(SMALL, B=rows)
    arrays = (*inputs[:4], inputs[5])
    (_, velocity), gradients = _step(params, arrays, 1.0)
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, param_shardings(boxed, mesh))
        (_, spread_velocity), spread_gradients = _step(spread, arrays, 1.0)
    kernel = spread["single_blocks"]["out"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 5, 2, 8, 8)
    golden.assert_close(spread_velocity, velocity, "velocity", 1e-5)
    jax.tree.map(lambda a, b: golden.assert_close(a, b, "gradient", 1e-4), spread_gradients, gradients)


def test_starts_at_zero_velocity_with_a_gradient():
    inputs, _, _ = _random(SMALL)
    params = jax.jit(lambda: nn.meta.unbox(MMDiT(SMALL).init(jax.random.key(1), *inputs)["params"]))()
    (value, velocity), gradients = _step(params, (*inputs[:4], inputs[5]), 1.0)
    assert value == 1.0 and not np.any(velocity)
    assert np.abs(gradients["out"]["kernel"]).max() > 0
    assert not np.any(params["siglip_embed"]["kernel"])


def test_init_makes_semantic_parameter_without_semantics():
    inputs, _, _ = _random(SMALL)
    assert golden.shapes(MMDiT(SMALL), *inputs[:5]) == golden.shapes(MMDiT(SMALL), *inputs)


def test_rope_rotates_adjacent_pairs_by_row_and_column():
    cos, sin = rope_tables((2, 3), 1, (2, 2, 2), theta=100.0)
    x = np.zeros((1, 7, 1, 6), np.float32)
    x[..., ::2] = 1.0
    y = np.asarray(apply_rope(jnp.asarray(x), cos, sin))[0, :, 0]
    np.testing.assert_allclose(y[0], x[0, 0, 0])
    row, column = 1, 2
    expected = [1, 0, np.cos(row), np.sin(row), np.cos(column), np.sin(column)]
    np.testing.assert_allclose(y[1 + row * 3 + column], expected, rtol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_table(name):
    cfg = PRESETS[name]
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 6, cfg.in_channels), (1,), (1, 2, cfg.text_dim), (1, cfg.pooled_dim))]
    shapes = jax.eval_shape(lambda *a: MMDiT(cfg).init(jax.random.key(0), *a, (2, 3)), *inputs)["params"]
    wanted = {k: v.shape for k, v in name_tables.flatten(nn.meta.unbox(shapes)).items()}
    assert name_tables.plan(name_tables.stand_ins(table(cfg), wanted), table(cfg), wanted)
    if name == "flux-dev-xomni":  # FLUX.1-dev's published 11.9B, and the semantic projection
        assert sum(np.prod(s, dtype=np.int64) for s in wanted.values()) == 11_901_408_320 + 1536 * 3072


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_heads=7), "does not divide into n_heads=7"),
        (dict(axes_dims=(2, 2, 2)), "sum to the head width 8"),
        (dict(n_single=0), "must both be at least 1"),
        (dict(remat="some"), "choose one of none, full, dots"),
    ],
)
def test_config_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
