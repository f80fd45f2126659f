"""Pixels to latents and back: the VAE of FLUX.1, or a rearrangement of pixels under the same interface. 2x2 packing for the MMDiT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from xomni_jax.models.attention import attend
from xomni_jax.models.layers import Conv, Dtype, GroupNorm, Projection

SAME = ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder.

    Attributes:
      kind: kl, the convolutional VAE, or identity: space-to-depth of the pixels, without parameters or loss
      identity_factor: pixels per latent along each side, of the identity kind
      pixel_channels: channels of an image
      latent_channels: channels of a latent
      block_channels: widths of the VAE's levels, each of which but the last halves the image
      layers_per_block: residual blocks per level
      groups: groups of the GroupNorms
      scaling_factor: latents are (z - shift_factor) * scaling_factor
      shift_factor: see scaling_factor
      query_chunk: queries per attention step of the middle block, 0 for all at once
      microbatch: images that a device encodes or decodes at a time, 0 for all. At 1152 x 1152 pixels one float32 array of the last level
        takes 0.6 GiB per image
      dtype: number format of the computation
      param_dtype: number format of the parameters
    """

    kind: str = "kl"
    identity_factor: int = 4
    pixel_channels: int = 3
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    query_chunk: int = 0
    microbatch: int = 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self):
        if self.microbatch < 0:
            raise ValueError(f"autoencoder.microbatch={self.microbatch} is not a number of images; use 1 or more, or 0 for all")
        if self.kind not in ("kl", "identity"):
            raise ValueError(f"autoencoder.kind={self.kind!r} is unknown; choose kl or identity")
        if self.kind == "identity" and self.latent_channels != self.pixel_channels * self.identity_factor**2:
            raise ValueError(
                f"autoencoder.latent_channels={self.latent_channels} must be pixel_channels x identity_factor^2 = "
                f"{self.pixel_channels * self.identity_factor**2} for the identity kind"
            )
        bad = [c for c in self.block_channels if c % self.groups]
        if self.kind == "kl" and bad:
            raise ValueError(f"autoencoder.block_channels: {bad[0]} does not divide into groups={self.groups}; change one of them")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return self.identity_factor if self.kind == "identity" else 2 ** (len(self.block_channels) - 1)

    @property
    def conv_axis(self) -> None:
        """Replicated: the weights are small (0.2 GB in bfloat16) and frozen, and not all of their widths divide over a mesh axis."""
        return None

    @property
    def packed_channels(self) -> int:
        """Channels of a packed token: 2x2 latents."""
        return 4 * self.latent_channels


def identity(factor: int) -> AutoencoderConfig:
    """The identity autoencoder of `factor` pixels per latent."""
    return AutoencoderConfig("identity", factor, latent_channels=3 * factor**2, scaling_factor=1.0, shift_factor=0.0)


PRESETS: dict[str, AutoencoderConfig] = {
    "flux": AutoencoderConfig(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, query_chunk=1024, microbatch=1),
    "identity-4": identity(4),
}


def pack(latents_BYXC: jax.Array) -> jax.Array:
    """[B, 2Y, 2X, C] -> tokens [B, Y * X, C * 4], row-major; each token holds its 2x2 latents channel-major (c, dy, dx)."""
    return rearrange(latents_BYXC, "B (Y dy) (X dx) C -> B (Y X) (C dy dx)", dy=2, dx=2)


def unpack(tokens_BTC: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Undoes `pack`: tokens of the grid (Y, X) -> latents [B, 2Y, 2X, C]."""
    return rearrange(tokens_BTC, "B (Y X) (C dy dx) -> B (Y dy) (X dx) C", Y=grid[0], X=grid[1], dy=2, dx=2)


def _conv(cfg: Any, name: str, features: int, kernel: int = 3, **kw) -> Conv:
    options = dict(padding=SAME if kernel == 3 else ((0, 0), (0, 0)), out_axis=cfg.conv_axis) | kw
    return Conv(features, kernel, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name=name, **options)


def _norm(cfg: AutoencoderConfig, name: str) -> GroupNorm:
    return GroupNorm(cfg.groups, 1e-6, cfg.dtype, cfg.param_dtype, name=name)


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution, plus the input (by a 1x1 convolution where the width changes)."""

    cfg: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        h = _conv(self.cfg, "conv1", self.features)(nn.silu(_norm(self.cfg, "norm1")(x_BYXC)))
        h = _conv(self.cfg, "conv2", self.features)(nn.silu(_norm(self.cfg, "norm2")(h)))
        return h + (x_BYXC if x_BYXC.shape[-1] == self.features else _conv(self.cfg, "skip", self.features, 1)(x_BYXC))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of [B, Y, X, C], plus the input."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape

        def linear(name):
            return Projection((C,), ("channels_in", "channels_out"), 1, True, self.cfg.dtype, self.cfg.param_dtype, name=name)

        h_BLC = _norm(self.cfg, "norm")(x_BYXC).reshape(B, Y * X, C)
        q, k, v = (linear(f"{name}_proj")(h_BLC)[:, :, None] for name in "qkv")
        y_BLC = attend(q, k, v, scale=C**-0.5, query_chunk=self.cfg.query_chunk)[:, :, 0]
        return x_BYXC + linear("out")(y_BLC).reshape(B, Y, X, C)


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    cfg: AutoencoderConfig

    @nn.compact
    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        C = x_BYXC.shape[-1]
        x = ResnetBlock(self.cfg, C, name="resnet_0")(x_BYXC)
        return ResnetBlock(self.cfg, C, name="resnet_1")(AttentionBlock(self.cfg, name="attention")(x))


class Encoder(nn.Module):
    """Pixels [B, H, W, 3] -> [B, H / factor, W / factor, out_channels].

    Attributes:
      cfg: the sizes of an autoencoder; or of `llamagen_vq`, which has the same blocks.
      in_features: width before the first level. out_channels: of the output.
      attention: attention follows each residual block of the last level.
    """

    cfg: Any
    in_features: int
    out_channels: int
    attention: bool = False

    @nn.compact
    def __call__(self, pixels_BYXC: jax.Array) -> jax.Array:
        c, last = self.cfg, len(self.cfg.block_channels) - 1
        x = _conv(c, "conv_in", self.in_features)(pixels_BYXC)
        for i, features in enumerate(c.block_channels):
            for j in range(c.layers_per_block):
                x = ResnetBlock(c, features, name=f"down_{i}_resnet_{j}")(x)
                if self.attention and i == last:
                    x = AttentionBlock(c, name=f"down_{i}_attention_{j}")(x)
            if i < last:  # padded at the bottom and right only
                x = _conv(c, f"down_{i}_sample", features, stride=2, padding=((0, 1), (0, 1)))(x)
        x = nn.silu(_norm(c, "norm_out")(Middle(c, name="middle")(x)))
        return _conv(c, "conv_out", self.out_channels)(x)


class Decoder(nn.Module):
    """Latents [B, Y, X, C], unscaled -> pixels [B, Y * factor, X * factor, 3]. Attributes as of `Encoder`."""

    cfg: Any
    attention: bool = False

    @nn.compact
    def __call__(self, z_BYXC: jax.Array) -> jax.Array:
        c = self.cfg
        x = Middle(c, name="middle")(_conv(c, "conv_in", c.block_channels[-1])(z_BYXC))
        for i, features in enumerate(reversed(c.block_channels)):
            for j in range(c.layers_per_block + 1):
                x = ResnetBlock(c, features, name=f"up_{i}_resnet_{j}")(x)
                if self.attention and i == 0:
                    x = AttentionBlock(c, name=f"up_{i}_attention_{j}")(x)
            if i < len(c.block_channels) - 1:
                nearest = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(c, f"up_{i}_sample", features)(nearest)
        return _conv(c, "conv_out", c.pixel_channels, out_axis=None)(nn.silu(_norm(c, "norm_out")(x)))


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] to scaled latents and back. The identity kind has no parameters: `init` returns no "params"."""

    cfg: AutoencoderConfig

    def setup(self):
        if self.cfg.kind == "kl":
            c = self.cfg
            self.encoder, self.decoder = Encoder(c, c.block_channels[0], 2 * c.latent_channels), Decoder(c)

    def __call__(self, pixels_BYXC: jax.Array) -> jax.Array:
        """Reconstruction through the mean latents; touches every parameter, for `init`."""
        return self.decode(self.encode(pixels_BYXC))

    def moments(self, pixels_BYXC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance [B, Y, X, C] of the posterior, float32, unscaled; log-variance within [-30, 20]. The "kl" kind only."""
        mean, logvar = jnp.split(self.encoder(pixels_BYXC).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, pixels_BYXC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Pixels [B, H, W, 3] -> latents [B, H / factor, W / factor, C], float32, scaled.

        Args:
          key: draws from the posterior; None takes its mean.

        Raises:
          ValueError: a side is not a multiple of the factor.
        """
        H, W = pixels_BYXC.shape[1:3]
        f = self.cfg.factor
        if H % f or W % f:
            raise ValueError(f"autoencoder: {H} x {W} pixels do not divide by its factor {f}; crop or resize them")
        if self.cfg.kind == "identity":
            z = rearrange(pixels_BYXC.astype(jnp.float32), "B (Y dy) (X dx) C -> B Y X (C dy dx)", dy=f, dx=f)
        else:
            mean, logvar = self.moments(pixels_BYXC)
            z = mean if key is None else mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return (z - self.cfg.shift_factor) * self.cfg.scaling_factor

    def decode(self, latents_BYXC: jax.Array) -> jax.Array:
        """Latents [B, Y, X, C], scaled -> pixels [B, Y * factor, X * factor, 3], float32, not clipped."""
        z = latents_BYXC.astype(jnp.float32) / self.cfg.scaling_factor + self.cfg.shift_factor
        if self.cfg.kind == "identity":
            f = self.cfg.factor
            return rearrange(z, "B Y X (C dy dx) -> B (Y dy) (X dx) C", dy=f, dx=f)
        return self.decoder(z.astype(self.cfg.dtype)).astype(jnp.float32)
