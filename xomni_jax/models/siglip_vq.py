"""SigLIP-VQ: the semantic tokenizer. Pixels -> ViT features -> codes -> semantics (X-Omni section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.layers import Conv, GroupNorm, Projection, named
from xomni_jax.models.quantizer import nearest_codes, normalize, quantize_train, unit_rows
from xomni_jax.models.vit import ViT, ViTConfig
from xomni_jax.sharding.rules import constrain


@dataclass(frozen=True)
class SigLIPVQConfig(ViTConfig):
    """Sizes of the tokenizer: those of its ViT, and the following.

    Attributes:
      codebook_size: rows of the codebook
      code_width: columns of the codebook
      conv_blocks: residual blocks after de-quantisation
      groups: of their GroupNorms
      skip_probability: probability per image that training skips quantisation
      temperature: of the soft assignment of codes
      beta: weight of the codebook loss
    """

    codebook_size: int = 16384
    code_width: int = 2048
    conv_blocks: int = 2
    groups: int = 32
    skip_probability: float = 0.1
    temperature: float = 2.0
    beta: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.groups:
            raise ValueError(f"SigLIPVQConfig: width={self.width} does not divide into groups={self.groups}; change one of them")
        if not 0.0 <= self.skip_probability <= 1.0:
            raise ValueError(f"SigLIPVQConfig: skip_probability={self.skip_probability} is not a probability; use 0 to 1")


PRESETS: dict[str, SigLIPVQConfig] = {
    "siglip2-g-xomni": SigLIPVQConfig(width=1536, layers=40, heads=16, mlp=6144),
    "siglip-so400m-xomni": SigLIPVQConfig(width=1152, layers=27, heads=16, mlp=4304),
    "tiny": SigLIPVQConfig(
        width=96, layers=3, heads=4, mlp=256, patch=8, pos_grid=16, codebook_size=512, code_width=32, conv_blocks=1, groups=8
    ),
}


class ResidualConv(nn.Module):
    """GroupNorm, GELU, 3x3 convolution, twice, plus the input. [B, Y, X, D] -> [B, Y, X, D]."""

    cfg: SigLIPVQConfig

    @nn.compact
    def __call__(self, x_BYXD: jax.Array) -> jax.Array:
        c, h_BYXD = self.cfg, x_BYXD
        kind = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        for i in (1, 2):
            h_BYXD = GroupNorm(c.groups, 1e-5, name=f"norm{i}", **kind)(h_BYXD)
            h_BYXD = jax.nn.gelu(h_BYXD, approximate=False)
            h_BYXD = Conv(c.width, 3, padding=((1, 1), (1, 1)), name=f"conv{i}", **kind)(h_BYXD)
        return x_BYXD + h_BYXD


class SigLIPVQ(nn.Module):
    """The tokenizer; `__call__` is the forward pass of its training. Takes images of any size that the patch divides."""

    cfg: SigLIPVQConfig

    def setup(self) -> None:
        c = self.cfg
        # float32 from here to the code, whatever the ViT computes in: rounding would move codes.
        self.quant_conv = Projection((c.code_width,), ("embed", "code"), bias=True, param_dtype=c.param_dtype)
        self.post_quant_conv = Projection((c.width,), ("code", "embed"), bias=True, dtype=c.dtype, param_dtype=c.param_dtype)
        self.post_conv = [ResidualConv(c) for _ in range(c.conv_blocks)]
        self.vit = ViT(c)
        self.codebook = self.param("codebook", named(unit_rows, "vocab", "code"), (c.codebook_size, c.code_width), c.param_dtype)

    def features(self, pixels_BHWC: jax.Array) -> jax.Array:
        """ViT features [B, Y, X, D] of pixels [B, H, W, 3] in [-1, 1]."""
        return self.vit(pixels_BHWC)

    def outputs(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Normalised encoder outputs z [B, Y, X, C]: what codes are searched for, and what a codebook is started from."""
        return normalize(self.quant_conv(self.vit(pixels_BHWC)))

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> codes [B, Y, X] int32."""
        return nearest_codes(self.outputs(pixels_BHWC), self.codebook)

    def semantics(self, codes_BYX: jax.Array) -> jax.Array:
        """Codes [B, Y, X] -> semantics [B, Y, X, D]. Codes out of range are the caller's error and are clamped."""
        # The raw row, not the normalised one that won the search.
        return self._decode(jnp.take(self.codebook, codes_BYX, axis=0, mode="clip"))

    def _decode(self, rows_BYXC: jax.Array) -> jax.Array:
        x_BYXD = constrain(self.post_quant_conv(rows_BYXC), "batch", "length", "length", "residual", name="semantics")
        for block in self.post_conv:
            x_BYXD = block(x_BYXD)
        return x_BYXD

    def __call__(self, pixels_BHWC: jax.Array, skip_B: jax.Array | None = None) -> dict[str, Any]:
        """Semantics of images after quantisation, with its losses.

        Args:
          skip_B: bool [B], True: the image skips quantisation and passes as continuous features. None quantises all.

        Returns:
          {"semantics": [B, Y, X, D], "codes": [B, Y, X], "z": [B, Y, X, C] normalised encoder outputs, "losses": the terms of
          `Quantized.losses`, "usage": [V] share of positions per code, "skipped": [B] bool}.
        """
        c = self.cfg
        if skip_B is None:
            skip_B = jnp.zeros(pixels_BHWC.shape[:1], bool)
        z_BYXC = self.outputs(pixels_BHWC)
        q = quantize_train(z_BYXC, self.codebook, skip_B, c.temperature, c.beta)
        return {"semantics": self._decode(q.rows), "codes": q.codes, "z": z_BYXC, "losses": q.losses, "usage": q.usage, "skipped": skip_B}
