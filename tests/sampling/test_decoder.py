"""Decoding in pieces and spread over a mesh: the same latents as all at once on one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.miniature import GRID, configs
from tests.models import golden
from xomni_jax.models.autoencoder import unpack
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, Decoder
from xomni_jax.sampling.flow import flow_sigmas, null_conditioning
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

B, T, SEQUENCE, POOLED = 16, GRID[0] * GRID[1], 6, 5
CONFIGS = configs()


@pytest.fixture(scope="module")
def boxed():
    """Shapes of the decoder's parameters with their logical axes."""
    return jax.eval_shape(lambda: {name: init_params(name, CONFIGS[name], jax.random.key(0)) for name in DECODER_COMPONENTS})


@pytest.fixture(scope="module")
def inputs(boxed):
    """Parameters away from their zero start, and 16 images' semantics, prompts, empty prompt and noise."""
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), nn.meta.unbox(boxed))
    ids = lambda n, length: rng.integers(1, 60, (n, length)).astype(np.int32)  # noqa: E731
    semantics = rng.standard_normal((B, *GRID, CONFIGS["mmdit"].semantic_dim)).astype(np.float32)
    noise = rng.standard_normal((B, T, CONFIGS["mmdit"].in_channels)).astype(np.float32)
    return params, semantics, ids(B, SEQUENCE), ids(B, POOLED), (ids(8, SEQUENCE)[:1].repeat(8, 0), ids(1, POOLED).repeat(8, 0)), noise


def decoder(microbatch: int) -> Decoder:
    changed = CONFIGS | {"mmdit": dataclasses.replace(CONFIGS["mmdit"], microbatch=microbatch)}
    return Decoder(**{name: COMPONENTS[name].module(changed[name]) for name in DECODER_COMPONENTS})


def drawn(inputs, rows: int, microbatch: int, guidance: float):
    params, semantics, text, pooled, empty, noise = inputs
    run = jax.jit(decoder(microbatch).latents, static_argnums=6)
    return run(params, semantics[:rows], text[:rows], pooled[:rows], empty, noise[:rows], DecodeConfig(steps=3, guidance=guidance))


@pytest.fixture(scope="module")
def whole(inputs):
    """All images at once on one device: {guidance: latents}."""
    return {guidance: np.asarray(drawn(inputs, B, 0, guidance)) for guidance in (1.0, 3.0)}


@pytest.mark.parametrize(
    "rows, microbatch, guidance",
    [
        (16, 1, 3.0),  # one at a time
        (4, 0, 1.0),  # too few for all devices: heads are split instead
        (8, 2, 3.0),  # two would be more than there are
    ],
)
def test_pieces_and_a_mesh_change_nothing(inputs, boxed, whole, rows, microbatch, guidance):
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    params = jax.device_put(inputs[0], param_shardings(boxed, mesh))
    with jax.set_mesh(mesh):
        latents = drawn((params, *inputs[1:]), rows, microbatch, guidance)
    golden.assert_close(latents, whole[guidance][:rows], "latents", 1e-5)


def test_pieces_on_one_device_change_nothing(inputs, whole):
    """Five images at most make four pieces of four."""
    golden.assert_close(drawn(inputs, B, 5, 1.0), whole[1.0], "latents", 1e-5)


def test_reused_blocks_are_those_of_the_step_before(inputs):
    """Against steps by hand, with guidance; and where each noise level gets its own blocks the method with the cache is the plain one."""
    params, semantics, text, pooled, empty, noise = inputs
    one, cfg = decoder(0), DecodeConfig(steps=5, guidance=3.0, reuse=2)
    args = semantics[:2], text[:2], pooled[:2], empty, noise[:2]
    got = jax.jit(one.latents, static_argnums=6)(params, *args, cfg)

    cond = one.condition(params, text[:2], pooled[:2], semantics[:2])
    nothing = one.condition(params, *empty, None)
    sides = cond, null_conditioning(cond, nothing.text_BSE[0], nothing.pooled_BE[0])
    x, kept = noise[:2], [None, None]
    sigmas = flow_sigmas(cfg.steps, T, base_shift=cfg.base_shift, max_shift=cfg.max_shift)
    for n, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        velocity = []
        for side, c in enumerate(sides):
            read = x, np.full(2, sigma), c.text_BSE, c.pooled_BE, GRID, c.semantics_BTC
            own, new = one.mmdit.apply({"params": params["mmdit"]}, *read, reuse=True, blocks_BTD=kept[side] if n % 2 else None)
            if n % 2 == 0:
                kept[side] = new
                plain = one.velocity(params, x, np.full(2, sigma), c, GRID)
                np.testing.assert_allclose(own, plain, rtol=1e-5, atol=1e-5)
            velocity.append(own)
        x = x + (following - sigma) * (velocity[1] + cfg.guidance * (velocity[0] - velocity[1]))
    np.testing.assert_allclose(got, unpack(x, GRID), rtol=1e-4, atol=1e-4 * np.abs(x).max())
    assert np.abs(got - np.asarray(drawn(inputs, 2, 0, 3.0))).max() > 1e-3


def test_reuse_has_limits():
    with pytest.raises(ValueError, match="decode.reuse=4 must lie between 1 and decode.steps=3"):
        DecodeConfig(steps=3, reuse=4)
