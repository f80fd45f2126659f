"""OmniTokenizer: images and clips through one encoder and decoder, attention over space, then causally over time (arXiv 2406.09399).

An image is a clip of one frame. The first frame has patches of its own; the frames after it are taken together, `frame_patch` at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from xomni_jax.models.attention import attend
from xomni_jax.models.layers import Dtype, LayerNorm, linear, named
from xomni_jax.models.quantizer import EXACT, normalize, unit_rows

ATTENTION_SCALE = 8.0  # of unit queries and keys
FIRST, REST = "B T (Y p) (X q) C -> B T Y X (C p q)", "B (T f) (Y p) (X q) C -> B T Y X (C f p q)"


@dataclass(frozen=True)
class OmniTokenizerConfig:
    """Sizes of the tokenizer.

    Attributes:
      kind: vq, codes; or kl, latents with a mean and a variance
      width: width of the residual stream
      heads: attention heads
      head_dim: width of one head, but of window attention, which has width / heads
      encoder_blocks: the encoder's layers over space, a letter each: t for attention over all of a frame, w for windows
      decoder_blocks: the decoder's layers over space
      temporal_layers: layers over time, in the encoder and in the decoder
      window: tokens along each side of a window
      rope: attention over all of a frame has rotary positions
      patch: pixels along each side of a token
      frame_patch: frames of a token, but of the first
      codebook_size: rows of the codebook
      code_width: columns of the codebook, or channels of a latent
      scrambled: positions in layers over time mix cells with times, as in the published code, whose weights need it; then later frames
        change the codes of earlier ones
      pixel_channels: channels of a frame
      dtype: number format of the computation
      param_dtype: number format of the parameters
    """

    kind: str = "vq"
    width: int = 512
    heads: int = 8
    head_dim: int = 64
    encoder_blocks: str = "ttww"
    decoder_blocks: str = "tttt"
    temporal_layers: int = 4
    window: int = 8
    rope: bool = True
    patch: int = 8
    frame_patch: int = 4
    codebook_size: int = 8192
    code_width: int = 8
    scrambled: bool = False
    pixel_channels: int = 3
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        if self.kind not in ("vq", "kl"):
            raise ValueError(f"OmniTokenizerConfig: kind={self.kind!r} is unknown; choose vq or kl")
        if strange := set(self.encoder_blocks + self.decoder_blocks) - set("tw"):
            raise ValueError(f"OmniTokenizerConfig: a block {strange.pop()!r} is unknown; t is attention over a frame, w over windows")
        if self.width % self.heads:
            raise ValueError(f"OmniTokenizerConfig: width={self.width} does not divide into heads={self.heads}; change one of them")
        if self.rope and self.head_dim % 4:
            raise ValueError(f"OmniTokenizerConfig: head_dim={self.head_dim} has no pairs for rows and columns; use a multiple of 4")

    @property
    def mlp(self) -> int:
        """Width of the MLP's hidden layer: two thirds of 4 x width, for a gated unit."""
        return int(4 * (2 / 3) * self.width)


PRESETS: dict[str, OmniTokenizerConfig] = {
    "vq": OmniTokenizerConfig(),
    "kl": OmniTokenizerConfig(kind="kl"),
    "tiny": OmniTokenizerConfig(
        width=64, heads=4, head_dim=16, encoder_blocks="tw", decoder_blocks="tt", temporal_layers=1, window=2, patch=4, codebook_size=512
    ),
}


def grid_rope(x_BLNH: jax.Array, columns: int) -> jax.Array:
    """Rotary positions of a row-major grid: pairs (2i, 2i + 1) turn with the column for even i, with the row for odd i."""
    H, at_L = x_BLNH.shape[-1], np.arange(x_BLNH.shape[1])
    freq = 10000.0 ** (-np.arange(0, H, 4) / H)
    angle_LP = np.stack([(at_L % columns)[:, None] * freq, (at_L // columns)[:, None] * freq], axis=-1).reshape(len(at_L), H // 2)
    cos, sin = (f(angle_LP).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = x_BLNH[..., ::2], x_BLNH[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_BLNH.shape)


class Norm(nn.Module):
    """Layer normalisation with a scale and no bias, eps 1e-5."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.cfg.param_dtype)
        return (LayerNorm(1e-5, affine=False)(x) * scale).astype(self.cfg.dtype)


class PositionConv(nn.Module):
    """Depthwise 3x3x3 convolution of [B, T, Y, X, D], which sees no later frame."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x_BTYXD: jax.Array) -> jax.Array:
        c, D = self.cfg, x_BTYXD.shape[-1]
        init = named(nn.initializers.lecun_normal(), "conv", "conv", "conv", "channels_in", None)
        kernel = self.param("kernel", init, (3, 3, 3, 1, D), c.param_dtype).astype(c.dtype)
        bias = self.param("bias", named(nn.initializers.zeros, None), (D,), c.param_dtype)
        dims, pads = ("NDHWC", "DHWIO", "NDHWC"), ((2, 0), (1, 1), (1, 1))
        y = jax.lax.conv_general_dilated(x_BTYXD.astype(c.dtype), kernel, (1, 1, 1), pads, dimension_numbers=dims, feature_group_count=D)
        return y + bias.astype(c.dtype)


class Attention(nn.Module):
    """Attention of unit queries and keys with learned scales. [B, L, D] -> [B, L, D]; queries come from the normed input alone."""

    cfg: OmniTokenizerConfig
    causal: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, columns: int = 0) -> jax.Array:
        c = self.cfg
        heads, axes = (c.heads, c.head_dim), ("embed", "heads", "head_dim")
        q_BLNH = linear(c, "q_proj", heads, axes, bias=False)(Norm(c, name="norm")(x_BLD))
        k_BLNH, v_BLNH = (linear(c, f"{name}_proj", heads, axes, bias=False)(x_BLD) for name in "kv")
        if columns:
            q_BLNH, k_BLNH = grid_rope(q_BLNH, columns), grid_rope(k_BLNH, columns)
        scale = {name: self.param(f"{name}_scale", named(nn.initializers.ones, None), (c.head_dim,), c.param_dtype) for name in "qk"}
        q_BLNH, k_BLNH = ((normalize(x) * scale[name]).astype(c.dtype) for x, name in ((q_BLNH, "q"), (k_BLNH, "k")))
        y_BLNH = attend(q_BLNH, k_BLNH, v_BLNH, scale=ATTENTION_SCALE, causal=self.causal)
        return linear(c, "out", c.width, ("heads", "head_dim", "embed"), bias=False, contract=2)(y_BLNH)


def window_index(window: int) -> np.ndarray:
    """[w * w, w * w]: row of the table of relative positions for each pair of tokens of a window."""
    at = np.stack(np.divmod(np.arange(window * window), window))
    dy, dx = at[:, :, None] - at[:, None] + window - 1
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Attention within squares of a frame, with a learned bias for each relative position. [B, Y, X, D] -> [B, Y, X, D]."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x_BYXD: jax.Array) -> jax.Array:
        c, (Y, X) = self.cfg, x_BYXD.shape[1:3]
        if Y % c.window or X % c.window:
            raise ValueError(f"a grid of {Y} x {X} tokens does not divide into windows of {c.window}; choose another size of images")
        h_BLD = rearrange(Norm(c, name="norm")(x_BYXD), "B (y p) (x q) D -> (B y x) (p q) D", p=c.window, q=c.window)
        sizes = 3, c.heads, c.width // c.heads
        qkv = linear(c, "qkv", sizes, ("embed", None, "heads", "head_dim"), bias=False)(h_BLD)
        shape = ((2 * c.window - 1) ** 2, c.heads)
        table = self.param("relative_bias", named(nn.initializers.normal(0.02), None, "heads"), shape, c.param_dtype)
        bias_NLL = jnp.moveaxis(table.astype(jnp.float32)[window_index(c.window)], -1, 0)
        y_BLNH = attend(*(qkv[:, :, i] for i in range(3)), scale=sizes[-1] ** -0.5, bias=bias_NLL)
        y_BLD = linear(c, "out", c.width, ("heads", "head_dim", "embed"), contract=2)(y_BLNH)
        return rearrange(y_BLD, "(B y x) (p q) D -> B (y p) (x q) D", y=Y // c.window, x=X // c.window, p=c.window)


class FeedForward(nn.Module):
    """Gated unit with the exact GELU."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.cfg
        h = LayerNorm(1e-5, dtype=c.dtype, param_dtype=c.param_dtype, name="norm")(x)
        up = linear(c, "in", (2, c.mlp), ("embed", None, "mlp"), bias=False)(h)
        return linear(c, "out", c.width, ("mlp", "embed"), bias=False)(up[..., 0, :] * jax.nn.gelu(up[..., 1, :], approximate=False))


class SpatialTransformer(nn.Module):
    """Layers over the cells of each frame. [B, T, Y, X, D] -> [B, T, Y, X, D]."""

    cfg: OmniTokenizerConfig
    blocks: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, (B, T, Y, X, D) = self.cfg, x.shape
        for i, block in enumerate(self.blocks):
            if block == "w":
                x = x + WindowAttention(c, name=f"layer_{i}_attention")(x.reshape(B * T, Y, X, D)).reshape(x.shape)
            else:
                x = x + PositionConv(c, name=f"layer_{i}_position")(x)
                attention = Attention(c, False, name=f"layer_{i}_attention")
                x = x + attention(x.reshape(B * T, Y * X, D), X if c.rope else 0).reshape(x.shape)
            x = x + FeedForward(c, name=f"layer_{i}_mlp")(x)
        return Norm(c, name="norm_out")(x)


class TemporalTransformer(nn.Module):
    """Layers over the times of each cell, causal. [B, T, Y, X, D] -> [B, T, Y, X, D]."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x_BTYXD: jax.Array) -> jax.Array:
        c, (B, T, Y, X, D) = self.cfg, x_BTYXD.shape
        x = rearrange(x_BTYXD, "B T Y X D -> (B Y X) T D")
        for i in range(c.temporal_layers):
            position = PositionConv(c, name=f"layer_{i}_position")
            if c.scrambled:  # the published code takes the rows (cell, time) for (time, cell)
                x = x + position(x.reshape(B, T, Y, X, D)).reshape(x.shape)
            else:
                ordered = position(rearrange(x, "(B Y X) T D -> B T Y X D", Y=Y, X=X))
                x = x + rearrange(ordered, "B T Y X D -> (B Y X) T D")
            x = x + Attention(c, True, name=f"layer_{i}_attention")(x)
            x = x + FeedForward(c, name=f"layer_{i}_mlp")(x)
        return rearrange(Norm(c, name="norm_out")(x), "(B Y X) T D -> B T Y X D", Y=Y, X=X)


class Patches(nn.Module):
    """Pixels [B, F, H, W, C] -> tokens [B, T, Y, X, D]."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, sizes = self.cfg, dict(p=self.cfg.patch, q=self.cfg.patch)
        rest = pixels[:, 1:]
        if rest.shape[1] == 0 and self.is_initializing():  # an image uses no parameters of later frames, which must exist
            rest = jnp.zeros((1, c.frame_patch, *pixels.shape[2:]))
        parts = [self._embed("first", rearrange(pixels[:, :1], FIRST, **sizes))]
        if rest.shape[1]:
            parts.append(self._embed("rest", rearrange(rest, REST, f=c.frame_patch, **sizes)))
        return jnp.concatenate(parts[: 1 + (pixels.shape[1] > 1)], axis=1)

    def _embed(self, name: str, x: jax.Array) -> jax.Array:
        norm = dict(eps=1e-5, dtype=self.cfg.dtype, param_dtype=self.cfg.param_dtype)
        x = linear(self.cfg, f"{name}_embed", self.cfg.width, (None, "embed"))(LayerNorm(name=f"{name}_norm_in", **norm)(x))
        return LayerNorm(name=f"{name}_norm_out", **norm)(x)


class Pixels(nn.Module):
    """Tokens [B, T, Y, X, D] -> pixels [B, F, H, W, C], float32."""

    cfg: OmniTokenizerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.cfg, self.cfg.patch
        first = linear(c, "first", c.pixel_channels * p * p, ("embed", None))
        rest = linear(c, "rest", c.pixel_channels * c.frame_patch * p * p, ("embed", None))
        backwards = lambda pattern, y, **f: rearrange(y, " -> ".join(pattern.split(" -> ")[::-1]), p=p, q=p, C=c.pixel_channels, **f)
        parts = [backwards(FIRST, first(x[:, :1]))]
        if x.shape[1] > 1 or self.is_initializing():
            parts.append(backwards(REST, rest(x[:, 1:] if x.shape[1] > 1 else x), f=c.frame_patch))
        return jnp.concatenate(parts[: 1 + (x.shape[1] > 1)], axis=1).astype(jnp.float32)


class OmniTokenizer(nn.Module):
    """The tokenizer of clips [B, F, H, W, C] in [-1, 1], whose first frame may be the only one."""

    cfg: OmniTokenizerConfig

    def setup(self) -> None:
        c = self.cfg
        self.patches, self.to_pixels = Patches(c), Pixels(c)
        self.encoder_space, self.encoder_time = SpatialTransformer(c, c.encoder_blocks), TemporalTransformer(c)
        self.decoder_time, self.decoder_space = TemporalTransformer(c), SpatialTransformer(c, c.decoder_blocks)
        self.pre_vq = linear(c, "pre_vq", c.code_width * (1 + (c.kind == "kl")), ("embed", "code"))
        self.post_vq = linear(c, "post_vq", c.width, ("code", "embed"))
        if c.kind == "vq":
            self.codebook = self.param("codebook", named(unit_rows, "vocab", "code"), (c.codebook_size, c.code_width), c.param_dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Reconstruction, of the mean latents for kl; touches every parameter."""
        return self.decode(self.encode(pixels)) if self.cfg.kind == "vq" else self.decode_latents(self.moments(pixels)[0])

    def features(self, pixels: jax.Array) -> jax.Array:
        """Pixels -> the encoder's tokens [B, T, Y, X, D].

        Raises:
          ValueError: frames after the first are no multiple of `frame_patch`, or sides none of `patch`.
        """
        c, (F, H, W) = self.cfg, pixels.shape[1:4]
        if (F - 1) % c.frame_patch or H % c.patch or W % c.patch:
            raise ValueError(
                f"a clip of {F} frames of {H} x {W} pixels does not divide into 1 + n x {c.frame_patch} frames and patches of {c.patch}"
            )
        return self.encoder_time(self.encoder_space(self.patches(pixels)))

    def outputs(self, pixels: jax.Array) -> jax.Array:
        """Normalised encoder outputs z [B, T, Y, X, C], float32 (vq)."""
        return normalize(self.pre_vq(self.features(pixels)))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Pixels -> codes [B, T, Y, X] int32 (vq). The nearest row as it is: rows are means of unit vectors and shorter than 1."""
        z, e_VC = self.outputs(pixels), self.codebook.astype(jnp.float32)
        d = jnp.sum(e_VC * e_VC, axis=-1) - 2.0 * jnp.einsum("...C,VC->...V", z, e_VC, precision=EXACT)
        return jnp.argmin(d, axis=-1).astype(jnp.int32)

    def moments(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance [B, T, Y, X, C] of the posterior, float32, log-variance within [-30, 20] (kl)."""
        mean, logvar = jnp.split(self.pre_vq(self.features(pixels)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def semantics(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Y, X] -> rows of the codebook [B, T, Y, X, C]. Codes out of range are the caller's error and are clamped."""
        return jnp.take(self.codebook, codes, axis=0, mode="clip")

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Y, X] -> pixels [B, F, H, W, C], float32, not clipped (vq)."""
        return self.decode_latents(self.semantics(codes))

    def decode_latents(self, z: jax.Array) -> jax.Array:
        """Latents or rows [B, T, Y, X, C] -> pixels [B, F, H, W, C], float32, not clipped."""
        return self.to_pixels(self.decoder_space(self.decoder_time(self.post_vq(z))))
