"""The diffusion decoder: semantics of codes and a prompt to pixels (X-Omni section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.autoencoder import pack, unpack
from xomni_jax.sampling.flow import Conditioning, euler_sample, euler_sample_reusing, flow_sigmas, guided_velocity, null_conditioning
from xomni_jax.sampling.logits import STRONGEST
from xomni_jax.sharding.rules import constrain, map_rows
from xomni_jax.tokenizers.protocol import ImageTokenizer

DECODER_COMPONENTS = ("mmdit", "t5", "clip", "autoencoder")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the decoder is sampled.

    Attributes:
      steps: Euler steps
      reuse: steps that one run of the MMDiT's blocks serves: those after the first add what the blocks added there; 1 runs them each time
      guidance: classifier-free guidance between (semantics, prompt) and (zero semantics, empty prompt), at twice the cost; 1 is off
      text_length: tokens of the T5 prompt
      pooled_length: tokens of the CLIP prompt
      base_shift: of the noise schedule at 256 tokens; see `flow_sigmas`
      max_shift: of the noise schedule at 4,096 tokens
    """

    steps: int = 28
    guidance: float = 1.0
    text_length: int = 512
    pooled_length: int = 77
    base_shift: float = 0.5
    max_shift: float = 1.15
    reuse: int = 1

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"decode.steps={self.steps} must be at least 1")
        if not 1 <= self.reuse <= self.steps:
            raise ValueError(f"decode.reuse={self.reuse} must lie between 1 and decode.steps={self.steps}")
        if not 0 <= self.guidance <= STRONGEST:
            raise ValueError(f"decode.guidance={self.guidance} is not a number from 0 to {STRONGEST:g}; 1 turns guidance off")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder's modules; every method is a pure function of `params` = {"mmdit", "t5", "clip", "autoencoder"}."""

    mmdit: nn.Module
    t5: nn.Module
    clip: nn.Module
    autoencoder: nn.Module

    def condition(self, params: Any, text_BS: jax.Array, pooled_BS: jax.Array, semantics_BYXD: jax.Array | None) -> Conditioning:
        """Encodes prompts given as T5 ids and CLIP ids, beside the semantics in row-major token order."""

        def encode(ids):
            _, pooled_BE = self.clip.apply({"params": params["clip"]}, ids[1])
            return self.t5.apply({"params": params["t5"]}, ids[0]), pooled_BE

        text_BSE, pooled_BE = map_rows(encode, (text_BS, pooled_BS))
        tokens = None if semantics_BYXD is None else semantics_BYXD.reshape(semantics_BYXD.shape[0], -1, semantics_BYXD.shape[-1])
        return Conditioning(text_BSE, pooled_BE, tokens)

    def velocity(self, params: Any, latents_BTC: jax.Array, sigma_B: jax.Array, cond: Conditioning, grid: tuple[int, int]) -> jax.Array:
        """The MMDiT's velocity for packed latents."""
        return self.mmdit.apply({"params": params["mmdit"]}, latents_BTC, sigma_B, cond.text_BSE, cond.pooled_BE, grid, cond.semantics_BTC)

    def encode(self, params: Any, pixels_BHWC: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> packed latents [B, T, C]: what the MMDiT learns to produce."""
        return pack(self._autoencode(params, "encode", pixels_BHWC))

    def latents(
        self,
        params: Any,
        semantics_BYXD: jax.Array,
        text_BS: jax.Array,
        pooled_BS: jax.Array,
        empty: tuple[jax.Array, jax.Array],
        noise_BTC: jax.Array,
        cfg: DecodeConfig,
    ) -> jax.Array:
        """Semantics to latents [B, 2Y, 2X, C], scaled.

        Args:
          semantics_BYXD: from `SigLIPVQ.semantics`.
          text_BS, pooled_BS: the prompts as T5 and CLIP ids; `empty` = the same two for the empty prompt, [1, S] each.
          noise_BTC: standard normal, packed.
        """
        grid = semantics_BYXD.shape[1:3]
        cond = self.condition(params, text_BS, pooled_BS, semantics_BYXD)
        nothing = self.condition(params, *empty, None) if cfg.guidance != 1.0 else None
        sigmas = flow_sigmas(cfg.steps, grid[0] * grid[1], base_shift=cfg.base_shift, max_shift=cfg.max_shift)

        def denoise(rows):
            noise_BTC, cond = rows
            negative = nothing and null_conditioning(cond, nothing.text_BSE[0], nothing.pooled_BE[0])

            def velocity(latents_BTC, sigma_B):
                conditioned = lambda x, s, c: self.velocity(params, x, s, c, grid)  # noqa: E731
                return guided_velocity(conditioned, latents_BTC, sigma_B, cond, negative, cfg.guidance)

            def evaluate(latents_BTC, sigma_B, blocks_BTD):
                kept = []

                def conditioned(x, s, c):
                    inputs = x, s, c.text_BSE, c.pooled_BE, grid, c.semantics_BTC
                    velocity, blocks = self.mmdit.apply({"params": params["mmdit"]}, *inputs, reuse=True, blocks_BTD=blocks_BTD)
                    kept.append(blocks)
                    return velocity

                return guided_velocity(conditioned, latents_BTC, sigma_B, cond, negative, cfg.guidance), kept[0]

            if cfg.reuse > 1:
                return euler_sample_reusing(evaluate, noise_BTC, sigmas, cfg.reuse)
            return euler_sample(velocity, noise_BTC, sigmas)

        return unpack(map_rows(denoise, (noise_BTC, cond), self.mmdit.cfg.microbatch), grid)

    def pixels(self, params: Any, latents_BYXC: jax.Array) -> jax.Array:
        """Latents, scaled -> pixels [B, H, W, 3], float32, not clipped."""
        return self._autoencode(params, "decode", latents_BYXC).astype(jnp.float32)

    def _autoencode(self, params: Any, method: str, x_BYXC: jax.Array) -> jax.Array:
        fn = lambda x: self.autoencoder.apply({"params": params["autoencoder"]}, x, method=method)  # noqa: E731
        return map_rows(fn, x_BYXC, self.autoencoder.cfg.microbatch)

    def decode(self, params: Any, *args: Any) -> jax.Array:
        """Semantics to pixels [B, H, W, 3] in [-1, 1]; arguments as for `latents`."""
        return jnp.clip(self.pixels(params, self.latents(params, *args)), -1.0, 1.0)


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> uint8 images, rounded."""
    return jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def make_decode(tokenizer: ImageTokenizer, decoder: Decoder, cfg: DecodeConfig, num_data_shards: int) -> Callable[..., jax.Array]:
    """The jitted decoder (tokenizer's parameters, decoder's, codes [B, Y, X], T5 ids, CLIP ids, noise, empty prompt's ids) -> uint8 images.

    `num_data_shards`: over how many devices rows are split.
    """

    def decode(vq_params, params, codes_BYX, text_BS, pooled_BS, noise_BTC, empty):
        semantics = tokenizer.semantics(vq_params, codes_BYX)
        # The two rows of the empty prompt are repeated, so that they too split over a mesh.
        empty = tuple(jnp.repeat(x, num_data_shards, axis=0) for x in empty)
        images = to_uint8(decoder.decode(params, semantics, text_BS, pooled_BS, empty, noise_BTC, cfg))
        return constrain(images, "batch", None, None, None, name="images")  # each host takes its own

    return jax.jit(decode)
