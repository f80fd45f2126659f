"""Autoencoder: parity with diffusers, the identity kind, packing."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import name_tables
from tests.models import golden
from tests.parity.reference_autoencoder import SIZES
from xomni_jax.checkpoint.names.autoencoder import table
from xomni_jax.models.autoencoder import PRESETS, Autoencoder, AutoencoderConfig, identity, pack, unpack
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

CFG = AutoencoderConfig(**SIZES)


def compare(arrays: dict[str, np.ndarray], cfg: AutoencoderConfig = CFG) -> None:
    """Posterior moments, scaled latents and decoded pixels against a reference's arrays."""
    model, pixels = Autoencoder(cfg), arrays["in/pixels"]
    params = name_tables.to_params(golden.part(arrays, "w"), table(cfg), golden.shapes(model, pixels))

    @jax.jit
    def run(params, pixels, latents):
        bound = model.bind({"params": params})
        return *bound.moments(pixels), bound.encode(pixels), bound.encode(pixels, jax.random.key(3)), bound.decode(latents)

    mean, logvar, latents, drawn, decoded = run(params, pixels, arrays["in/latents"])
    golden.assert_close(mean, arrays["out/mean"], "mean")
    golden.assert_close(logvar, arrays["out/logvar"], "logvar")
    scaled = (arrays["out/mean"] - cfg.shift_factor) * cfg.scaling_factor
    golden.assert_close(latents, scaled, "latents")
    noise = np.exp(0.5 * arrays["out/logvar"]) * jax.random.normal(jax.random.key(3), mean.shape)
    golden.assert_close(drawn, scaled + noise * cfg.scaling_factor, "drawn latents")
    golden.assert_close(decoded, arrays["out/pixels"], "pixels")


def test_golden():
    compare(golden.load("autoencoder"), dataclasses.replace(CFG, query_chunk=4))


def test_flux_preset_has_the_released_size_and_shards():
    cfg = PRESETS["flux"]
    boxed = jax.eval_shape(lambda: Autoencoder(cfg).init(jax.random.key(0), jnp.zeros((1, 16, 24, 3))))["params"]
    wanted = {k: v.shape for k, v in name_tables.flatten(nn.meta.unbox(boxed)).items()}
    assert name_tables.plan(name_tables.stand_ins(table(cfg), wanted), table(cfg), wanted)
    assert sum(np.prod(s) for s in wanted.values()) == 83_819_683  # the parameter count of the released VAE
    assert cfg.factor == 8 and cfg.packed_channels == 64
    param_shardings(boxed, make_mesh(dict(fsdp=4, tensor=2)))


def test_identity_is_lossless_and_has_no_parameters(rng):
    cfg = PRESETS["identity-4"]
    pixels = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    model = Autoencoder(cfg)
    assert not jax.tree.leaves(model.init(jax.random.key(0), pixels))
    latents = model.apply({}, pixels, method="encode")
    assert latents.shape == (2, 2, 3, 48) and cfg.packed_channels == 192
    np.testing.assert_array_equal(model.apply({}, latents, method="decode"), pixels)
    np.testing.assert_array_equal(latents[1, 1, 2, 16:32].reshape(4, 4), pixels[1, 4:8, 8:12, 1])
    assert table(cfg).rules == []


def test_pack_is_channel_major(rng):
    latents = rng.normal(size=(2, 4, 6, 5)).astype(np.float32)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 20)
    np.testing.assert_array_equal(tokens[1, 1 * 3 + 2], latents[1, 2:4, 4:6].transpose(2, 0, 1).reshape(-1))
    np.testing.assert_array_equal(unpack(tokens, (2, 3)), latents)


def test_refusals():
    with pytest.raises(ValueError, match="choose kl or identity"):
        AutoencoderConfig(kind="vq")
    with pytest.raises(ValueError, match="identity_factor.2 = 48"):
        dataclasses.replace(identity(4), latent_channels=16)
    with pytest.raises(ValueError, match="14 does not divide into groups=3"):
        dataclasses.replace(CFG, block_channels=(6, 14), groups=3)
    with pytest.raises(ValueError, match="10 x 12 pixels do not divide by its factor 4"):
        Autoencoder(identity(4)).apply({}, np.zeros((1, 10, 12, 3)), method="encode")
