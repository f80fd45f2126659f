"""What the MMDiT's last layer may mean: the velocity itself, or data from which the velocity follows."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from xomni_jax.models.mmdit import MIN_SIGMA, MMDiT, MMDiTConfig

CFG = MMDiTConfig(
    in_channels=12, d_model=24, n_heads=3, axes_dims=(2, 2, 4), n_double=1, n_single=1, text_dim=10, pooled_dim=14, semantic_dim=18,
    guidance_embed=False,
)  # fmt: skip


def test_data_prediction_gives_the_velocity_towards_its_data(rng):
    inputs = [rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 12), (2, 5, 10), (2, 14), (2, 6, 18))]
    latents, text, pooled, semantics = inputs
    sigma = np.array([0.6, 0.01], np.float32)
    args = (latents, sigma, text, pooled, (2, 3), semantics)
    params = nn.meta.unbox(MMDiT(CFG).init(jax.random.key(0), *args)["params"])
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32) * 0.2, params)  # no zero-initialised layer left
    out = MMDiT(CFG).apply({"params": params}, *args)
    velocity = MMDiT(dataclasses.replace(CFG, prediction="data")).apply({"params": params}, *args)
    np.testing.assert_allclose(velocity[0], (latents[0] - out[0]) / 0.6, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(velocity[1], (latents[1] - out[1]) / MIN_SIGMA, rtol=1e-5, atol=1e-4)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="choose velocity or data"):
        dataclasses.replace(CFG, prediction="noise")
