"""LlamaGen's VQ: a tokenizer of pixels with its own decoder (arXiv 2406.06525 section 3.1). Pixels -> codes -> unit rows -> pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.autoencoder import Decoder, Encoder
from xomni_jax.models.layers import Dtype, Projection, named
from xomni_jax.models.quantizer import nearest_codes, normalize, quantize_straight_through, unit_rows


@dataclass(frozen=True)
class LlamaGenVQConfig:
    """Sizes of the tokenizer.

    Attributes:
      codebook_size: rows of the codebook
      code_width: columns of the codebook
      z_channels: width between encoder and quantiser
      in_features: width before the encoder's first level
      block_channels: widths of the levels, each of which but the last halves the image
      layers_per_block: residual blocks of the encoder per level; the decoder has one more
      groups: groups of the GroupNorms
      pixel_channels: channels of an image
      beta: weight of the commitment loss
      entropy_weight: weight of the entropy loss, 0 in the published recipe
      query_chunk: queries per attention step, 0 for all at once
      dtype: number format of the computation
      param_dtype: number format of the parameters
    """

    codebook_size: int = 16384
    code_width: int = 8
    z_channels: int = 256
    in_features: int = 128
    block_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    layers_per_block: int = 2
    groups: int = 32
    pixel_channels: int = 3
    beta: float = 0.25
    entropy_weight: float = 0.0
    query_chunk: int = 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if bad := [c for c in (self.in_features, *self.block_channels) if c % self.groups]:
            raise ValueError(f"LlamaGenVQConfig: a width of {bad[0]} does not divide into groups={self.groups}; change one of them")

    @property
    def conv_axis(self) -> str:
        """Logical axis of the convolutions' outputs."""
        return "channels_out"

    @property
    def patch(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.block_channels) - 1)


PRESETS: dict[str, LlamaGenVQConfig] = {
    "vq-16": LlamaGenVQConfig(),
    "vq-8": LlamaGenVQConfig(block_channels=(128, 256, 256, 512)),
    "tiny": LlamaGenVQConfig(
        codebook_size=512, code_width=8, z_channels=32, in_features=32, block_channels=(32, 32, 64), layers_per_block=1, groups=8
    ),
}


class LlamaGenVQ(nn.Module):
    """The tokenizer; `__call__` is the forward pass of its training. Takes images of any size that the patch divides."""

    cfg: LlamaGenVQConfig

    def setup(self) -> None:
        c = self.cfg
        self.encoder, self.decoder = Encoder(c, c.in_features, c.z_channels, attention=True), Decoder(c, attention=True)
        # float32 from here to the code, whatever the encoder computes in: rounding would move codes.
        self.quant_conv = Projection((c.code_width,), ("embed", "code"), bias=True, param_dtype=c.param_dtype)
        self.post_quant_conv = Projection((c.z_channels,), ("code", "embed"), bias=True, dtype=c.dtype, param_dtype=c.param_dtype)
        self.codebook = self.param("codebook", named(unit_rows, "vocab", "code"), (c.codebook_size, c.code_width), c.param_dtype)

    def outputs(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Normalised encoder outputs z [B, Y, X, C] of pixels [B, H, W, 3] in [-1, 1].

        Raises:
          ValueError: a side is not a multiple of the patch.
        """
        H, W = pixels_BHWC.shape[1:3]
        if H % self.cfg.patch or W % self.cfg.patch:
            raise ValueError(f"image of {H} x {W} pixels does not divide into patches of {self.cfg.patch}; use data.preprocess")
        return normalize(self.quant_conv(self.encoder(pixels_BHWC)))

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> codes [B, Y, X] int32."""
        return nearest_codes(self.outputs(pixels_BHWC), self.codebook)

    def semantics(self, codes_BYX: jax.Array) -> jax.Array:
        """Codes [B, Y, X] -> their unit rows [B, Y, X, C]. Codes out of range are the caller's error and are clamped."""
        return normalize(jnp.take(self.codebook, codes_BYX, axis=0, mode="clip"))

    def pixels(self, rows_BYXC: jax.Array) -> jax.Array:
        """Rows of the codebook -> pixels [B, H, W, 3], float32, not clipped."""
        return self.decoder(self.post_quant_conv(rows_BYXC)).astype(jnp.float32)

    def decode(self, codes_BYX: jax.Array) -> jax.Array:
        """Codes [B, Y, X] -> pixels [B, H, W, 3], float32, not clipped."""
        return self.pixels(self.semantics(codes_BYX))

    def __call__(self, pixels_BHWC: jax.Array, skip_B: jax.Array | None = None) -> dict[str, Any]:
        """Reconstruction through the codes, with the quantiser's losses.

        Args:
          skip_B: bool [B], True: the image skips quantisation. None quantises all.

        Returns:
          {"pixels": [B, H, W, 3], "codes": [B, Y, X], "z": [B, Y, X, C] normalised encoder outputs, "losses": the terms of
          `Quantized.losses`, "usage": [V] share of positions per code}.
        """
        z_BYXC = self.outputs(pixels_BHWC)
        q = quantize_straight_through(z_BYXC, self.codebook, skip_B, self.cfg.beta, self.cfg.entropy_weight)
        return {"pixels": self.pixels(q.rows), "codes": q.codes, "z": z_BYXC, "losses": q.losses, "usage": q.usage}
