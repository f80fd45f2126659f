"""The diffusion decoder's transformer: FLUX's MMDiT with the semantic map added between its two halves (paper section 3)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.models.attention import attend, check_attention
from xomni_jax.models.layers import LayerNorm, RMSNorm, linear
from xomni_jax.models.stack import StackConfig, stacked
from xomni_jax.sharding.rules import constrain

TIME_FEATURES = 256
MIN_SIGMA = 0.05
ZEROS = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(StackConfig):
    """Sizes of the MMDiT.

    Attributes:
      in_channels: channels of a packed latent token, in and out (16 latent channels x 2 x 2 in FLUX)
      d_model: width of both streams
      n_heads: attention heads
      axes_dims: parts of a head's width for the rotary positions (0, row, column)
      n_double: blocks with separate weights for text and image
      n_single: blocks with shared weights
      text_dim: width of the T5 sequence
      pooled_dim: width of the CLIP vector
      semantic_dim: width of the semantic map
      guidance_embed: whether the guidance strength is an input, as in the distilled FLUX.1-dev
      mlp_ratio: width of the MLP's hidden layer / d_model
      theta: base of the rotary frequencies
      prediction: what the last layer predicts: velocity, as released, or data, from which the velocity follows. Predicting the velocity
        requires the noise of a patch to pass through the residual stream, for which a narrow model on large patches has no room
      attention: implementation of attention: auto, plain or splash; see `attention.attend`
      query_chunk: queries per step of plain attention, 0 for all at once
      unroll: blocks per step of the scans over them
      microbatch: images that a device denoises at a time, 0 for all. Each microbatch reads all weights in every step, and on a mesh
        gathers them
      int8: kernels are stored in 8 bits, for inference; see `models.int8`
    """

    in_channels: int = 64
    d_model: int = 3072
    n_heads: int = 24
    axes_dims: tuple[int, ...] = (16, 56, 56)
    n_double: int = 19
    n_single: int = 38
    text_dim: int = 4096
    pooled_dim: int = 768
    semantic_dim: int = 1536
    guidance_embed: bool = True
    mlp_ratio: int = 4
    theta: float = 10_000.0
    prediction: str = "velocity"
    attention: str = "auto"
    query_chunk: int = 0
    unroll: int = 1
    microbatch: int = 0
    int8: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_attention("mmdit", self.attention)
        if self.microbatch < 0:
            raise ValueError(f"mmdit.microbatch={self.microbatch} is not a number of images; use 1 or more, or 0 for all")
        if self.prediction not in ("velocity", "data"):
            raise ValueError(f"mmdit.prediction={self.prediction!r} is unknown; choose velocity or data")
        if self.d_model % self.n_heads:
            raise ValueError(f"mmdit.d_model={self.d_model} does not divide into n_heads={self.n_heads}; change one of them")
        if len(self.axes_dims) != 3 or any(d % 2 for d in self.axes_dims) or sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"mmdit.axes_dims={self.axes_dims} must be three even sizes that sum to the head width {self.head_dim}")
        if min(self.n_double, self.n_single) < 1:
            raise ValueError(f"mmdit.n_double={self.n_double} and n_single={self.n_single} must both be at least 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.d_model * self.mlp_ratio


PRESETS: dict[str, MMDiTConfig] = {
    "flux-dev-xomni": MMDiTConfig(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full", query_chunk=512, microbatch=4),
    "tiny": MMDiTConfig(
        in_channels=192, d_model=128, n_heads=4, axes_dims=(8, 12, 12), n_double=1, n_single=4,
        text_dim=64, pooled_dim=64, semantic_dim=96, guidance_embed=False, unroll=4, prediction="data",
    ),
}  # fmt: skip


def rope_tables(grid: tuple[int, int], n_text: int, axes_dims: tuple[int, ...], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and signed sines [L, H] of text tokens at (0, 0, 0), then image tokens at (0, row, column), row-major.

    Adjacent features (2i, 2i + 1) form a pair; the sine of the first is negated, so that a rotation is x * cos + swap(x) * sin.
    """
    Y, X = grid
    image = np.stack([np.zeros((Y, X)), *np.mgrid[:Y, :X]], axis=-1).reshape(Y * X, 3)
    positions = np.concatenate([np.zeros((n_text, 3)), image])
    # float64, as the released model computes them: at column 100 a float32 angle is off by 1e-5.
    angles = [positions[:, i, None] * theta ** -(np.arange(0, d, 2) / d) for i, d in enumerate(axes_dims)]
    angles_LH = np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1)
    signs_H = np.tile([-1.0, 1.0], angles_LH.shape[-1] // 2)
    return np.cos(angles_LH).astype(np.float32), (np.sin(angles_LH) * signs_H).astype(np.float32)


def apply_rope(x_BLNH: jax.Array, cos_LH: np.ndarray, sin_LH: np.ndarray) -> jax.Array:
    """Rotates the adjacent pairs of [B, L, N, H] in float32; returns x's dtype."""
    x = x_BLNH.astype(jnp.float32)
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (x * cos_LH[:, None] + swapped * sin_LH[:, None]).astype(x_BLNH.dtype)


def sinusoidal(t_B: jax.Array, features: int = TIME_FEATURES) -> jax.Array:
    """Sinusoidal embedding [B, features] of a scalar per sample, cosines first, periods up to 2 pi 10,000."""
    half = features // 2
    angles = t_B.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10_000.0) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ConditionMLP(nn.Module):
    """Two linear layers with SiLU between: a scalar's embedding or the pooled text [B, E] -> [B, D]."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, x_BE: jax.Array) -> jax.Array:
        h_BF = nn.silu(linear(self.cfg, "in", self.cfg.d_model, ("code", "mlp"))(x_BE))
        return linear(self.cfg, "out", self.cfg.d_model, ("mlp", "embed"))(h_BF)


class Modulation(nn.Module):
    """SiLU, then one linear to `chunks` vectors of the model width: [B, D] -> chunks of [B, 1, D].

    Initialised to zero (adaLN-zero): every gate is 0 and a new block is the identity.
    """

    cfg: MMDiTConfig
    chunks: int

    @nn.compact
    def __call__(self, condition_BD: jax.Array) -> list[jax.Array]:
        project = linear(self.cfg, "linear", (self.chunks, self.cfg.d_model), ("embed", None, "modulation"), init=ZEROS)
        return [m[:, None] for m in jnp.unstack(project(nn.silu(condition_BD)), axis=1)]


class ModulatedNorm(nn.Module):
    """LayerNorm without parameters, then x * (1 + scale) + shift."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
        return LayerNorm(1e-6, affine=False, dtype=self.cfg.dtype)(x_BLD) * (1 + scale_B1D) + shift_B1D


class QKV(nn.Module):
    """Queries, keys and values [B, L, N, H] of one stream, queries and keys with RMSNorm per head and rotary positions."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, cos_LH: np.ndarray, sin_LH: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.cfg
        heads, axes = (c.n_heads, c.head_dim), ("embed", "heads", "head_dim")
        q, k, v = (
            constrain(linear(c, name, heads, axes)(x_BLD), "batch", "length", "heads", "head_dim", name=f"mmdit/{name}")
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (RMSNorm(1e-6, c.dtype, c.param_dtype, name=f"{n}_norm")(t) for n, t in (("q", q), ("k", k)))
        # Text positions are all zero and rotate by nothing: the caller passes None.
        return (q, k, v) if cos_LH is None else (apply_rope(q, cos_LH, sin_LH), apply_rope(k, cos_LH, sin_LH), v)


class MLP(nn.Module):
    """Linear, GELU in its tanh form, linear."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = nn.gelu(linear(self.cfg, "in", self.cfg.mlp_dim, ("embed", "mlp"))(x_BLD), approximate=True)
        return linear(self.cfg, "out", self.cfg.d_model, ("mlp", "embed"))(h_BLF)


class DoubleStreamBlock(nn.Module):
    """Text and image with weights of their own and one joint attention, text first."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, streams, condition_BD, cos_LH, sin_LH):
        """([B, S, D] text, [B, T, D] image) -> (the same, None), the form of `stack.stacked`."""
        c, S = self.cfg, streams[0].shape[1]
        mods = [Modulation(c, 6, name=f"{s}_modulation")(condition_BD) for s in ("text", "image")]
        tables = ((None, None), (cos_LH[S:], sin_LH[S:]))
        qkv = [
            QKV(c, name=f"{s}_qkv")(ModulatedNorm(c)(x, m[0], m[1]), *table)
            for s, x, m, table in zip(("text", "image"), streams, mods, tables)
        ]
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*qkv))
        y_BLNH = attend(q, k, v, scale=c.head_dim**-0.5, kind=c.attention, query_chunk=c.query_chunk)
        out = []
        for s, x, m, y in zip(("text", "image"), streams, mods, (y_BLNH[:, :S], y_BLNH[:, S:])):
            x = x + m[2] * linear(c, f"{s}_out", c.d_model, ("heads", "head_dim", "embed"), contract=2)(y)
            x = x + m[5] * MLP(c, name=f"{s}_mlp")(ModulatedNorm(c)(x, m[3], m[4]))
            out.append(constrain(x, "batch", "length", "residual", name=f"mmdit/{s}"))
        return tuple(out), None


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel from one norm into one output projection."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(self, x_BLD, condition_BD, cos_LH, sin_LH):
        """[B, S + T, D] -> (the same, None), the form of `stack.stacked`."""
        c = self.cfg
        shift, scale, gate = Modulation(c, 3, name="modulation")(condition_BD)
        h_BLD = ModulatedNorm(c)(x_BLD, shift, scale)
        q, k, v = QKV(c, name="qkv")(h_BLD, cos_LH, sin_LH)
        y_BLNH = attend(q, k, v, scale=c.head_dim**-0.5, kind=c.attention, query_chunk=c.query_chunk)
        # The hidden MLP is kept as (ratio, heads, head_dim): joined with the attention along an axis that no mesh splits, the joint
        # projection of the released weights stays one kernel and tensor parallelism needs no reshuffle.
        hidden = (c.mlp_ratio, c.n_heads, c.head_dim)
        f_BLRNH = nn.gelu(linear(c, "mlp_in", hidden, ("embed", None, "heads", "head_dim"))(h_BLD), approximate=True)
        joint_BLRNH = jnp.concatenate([y_BLNH[:, :, None], f_BLRNH], axis=2)
        out_BLD = linear(c, "out", c.d_model, (None, "heads", "head_dim", "embed"), contract=3)(joint_BLRNH)
        return constrain(x_BLD + gate * out_BLD, "batch", "length", "residual", name="mmdit/joint"), None


class MMDiT(nn.Module):
    """Velocity of packed latents under text and semantic conditions (FLUX.1-dev with X-Omni's semantic input)."""

    cfg: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        latents_BTC: jax.Array,
        sigma_B: jax.Array,
        text_BSE: jax.Array,
        pooled_BE: jax.Array,
        grid: tuple[int, int],
        semantics_BTC: jax.Array | None = None,
        guidance_B: jax.Array | None = None,
        reuse: bool = False,
        blocks_BTD: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predicts noise - data for latents = (1 - sigma) data + sigma noise.

        Args:
          latents_BTC: packed latents, T = Y * X tokens, row-major.
          sigma_B: noise level in [0, 1].
          text_BSE: text encoder sequence, of any length. pooled_BE: pooled text vector.
          grid: (Y, X), static.
          semantics_BTC: one semantic vector per token; None leaves the semantic input out.
          guidance_B: guidance strength for `guidance_embed` models; None means 1.
          reuse: also return what the blocks added to the embedded latents; `blocks_BTD` is that of an earlier call, at a noise level
            nearby, and takes their place.

        Returns:
          velocity_BTC in float32; with `reuse` (velocity_BTC, blocks_BTD).
        """
        c, (B, T, _) = self.cfg, latents_BTC.shape
        condition_BD = ConditionMLP(c, name="time_embed")(sinusoidal(sigma_B * 1000.0))
        if c.guidance_embed:
            guidance_B = jnp.ones(B) if guidance_B is None else guidance_B
            condition_BD += ConditionMLP(c, name="guidance_embed")(sinusoidal(guidance_B * 1000.0))
        condition_BD += ConditionMLP(c, name="pooled_embed")(pooled_BE)

        text_BSD = linear(c, "text_embed", c.d_model, ("code", "embed"))(text_BSE)
        embedded_BTD = linear(c, "latent_embed", c.d_model, ("code", "embed"))(latents_BTC)
        if blocks_BTD is None:
            x_BLD = self._blocks(text_BSD, embedded_BTD, condition_BD, semantics_BTC, grid)
        else:
            x_BLD = embedded_BTD + blocks_BTD
        scale, shift = Modulation(c, 2, name="final_modulation")(condition_BD)  # the released order: scale first
        x_BTD = x_BLD[:, -T:]
        h_BTD = ModulatedNorm(c)(x_BTD, shift, scale)
        out_BTC = linear(c, "out", c.in_channels, ("embed", "code"), init=ZEROS)(h_BTD).astype(jnp.float32)
        # x = (1 - sigma) data + sigma noise, so noise - data = (x - data) / sigma; the floor bounds the loss's weight near the data.
        data = c.prediction == "data"
        velocity_BTC = (latents_BTC - out_BTC) / jnp.maximum(sigma_B, MIN_SIGMA)[:, None, None] if data else out_BTC
        return (velocity_BTC, x_BTD - embedded_BTD) if reuse else velocity_BTC

    def _blocks(self, text_BSD, image_BTD, condition_BD, semantics_BTC, grid) -> jax.Array:
        """Text and embedded latents after all blocks, as one sequence."""
        c, (B, T, _) = self.cfg, image_BTD.shape
        cos_LH, sin_LH = rope_tables(grid, text_BSD.shape[1], c.axes_dims, c.theta)
        streams = tuple(constrain(x, "batch", "length", "residual", name="mmdit/embed") for x in (text_BSD, image_BTD))
        double = stacked(DoubleStreamBlock, c.n_double, c.remat, (nn.broadcast,) * 3, c.unroll)
        (text_BSD, image_BTD), _ = double(c, name="double_blocks")(streams, condition_BD, cos_LH, sin_LH)

        if semantics_BTC is None and self.is_initializing():  # the parameter must exist whatever the first call is
            semantics_BTC = jnp.zeros((B, T, c.semantic_dim))
        if semantics_BTC is not None:
            image_BTD += linear(c, "siglip_embed", c.d_model, ("code", "embed"), bias=False, init=ZEROS)(semantics_BTC)

        x_BLD = jnp.concatenate([text_BSD, image_BTD], axis=1)
        single = stacked(SingleStreamBlock, c.n_single, c.remat, (nn.broadcast,) * 3, c.unroll)
        x_BLD, _ = single(c, name="single_blocks")(x_BLD, condition_BD, cos_LH, sin_LH)
        return x_BLD
