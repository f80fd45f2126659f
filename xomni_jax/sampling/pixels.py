"""Codes to images in one program: the tokenizer's semantics, the diffusion decoder, pixels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.sampling.decoder import DecodeConfig, Decoder, to_uint8
from xomni_jax.sharding.rules import constrain

DECODER_PARTS = ("mmdit", "t5", "clip", "autoencoder")


def make_decode(vq: nn.Module, decoder: Decoder, cfg: DecodeConfig, ways: int) -> Callable[..., jax.Array]:
    """The jitted decoder (tokenizer's parameters, decoder's, codes [B, Y, X], T5 ids, CLIP ids, noise, empty prompt's ids) -> uint8 images.

    `ways`: over how many devices rows are split.
    """

    def decode(vq_params, params, codes_BYX, text_BS, pooled_BS, noise_BTC, empty):
        semantics = vq.apply({"params": vq_params}, codes_BYX, method="semantics")
        # The two rows of the empty prompt are repeated, so that they too split over a mesh.
        empty = tuple(jnp.repeat(x, ways, axis=0) for x in empty)
        images = to_uint8(decoder.decode(params, semantics, text_BS, pooled_BS, empty, noise_BTC, cfg))
        return constrain(images, "batch", None, None, None, name="images")  # each host takes its own

    return jax.jit(decode)
