"""The vision transformer of the SigLIP-VQ tokenizer: any image size, no class token, no final norm, no pooling."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.models.attention import attend, check_attention
from xomni_jax.models.layers import Conv, LayerNorm, linear, named
from xomni_jax.models.stack import StackConfig, stacked
from xomni_jax.sharding.rules import constrain


@dataclass(frozen=True)
class ViTConfig(StackConfig):
    """Sizes of the vision transformer.

    Attributes:
      width: width of the residual stream
      layers: number of blocks
      heads: attention heads
      mlp: width of the MLP's hidden layer
      patch: pixels along each side of a token
      pos_grid: side of the square grid of learned positions
      norm_eps: of the LayerNorms
      attention: implementation of attention: auto, plain or splash; see `attention.attend`
      query_chunk: queries per step of plain attention, 0 for all at once; by default a sixth of the released 72 x 72 tokens
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int = 16
    pos_grid: int = 128
    norm_eps: float = 1e-6
    attention: str = "auto"
    query_chunk: int = 864

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.width % self.heads:
            raise ValueError(f"{name}: width={self.width} does not divide into heads={self.heads}; change one of them")
        super().__post_init__()
        check_attention(name, self.attention)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


def bilinear_weights(size: int, out: int) -> np.ndarray:
    """Row-stochastic [out, size] matrix of bilinear resizing with half-pixel centres and no antialiasing.

    The convention of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False)`: when shrinking,
    only two source rows are read per output row, however many lie between.
    """
    centre = np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0.0)
    low = np.minimum(np.floor(centre).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    part = (centre - low).astype(np.float32)
    weights = np.zeros((out, size), np.float32)
    np.add.at(weights, (np.arange(out), low), 1.0 - part)
    np.add.at(weights, (np.arange(out), high), part)
    return weights


def resize_positions(table_GGD: jax.Array, rows: int, columns: int) -> jax.Array:
    """Learned positions of a square grid [G, G, D] resized to an image's token grid [rows, columns, D], in float32."""
    w_YG, w_XG = bilinear_weights(table_GGD.shape[0], rows), bilinear_weights(table_GGD.shape[1], columns)
    table_GGD = table_GGD.astype(jnp.float32)
    table_YGD = jnp.einsum("YG,GXD->YXD", w_YG, table_GGD, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("XG,YGD->YXD", w_XG, table_YGD, precision=jax.lax.Precision.HIGHEST)


class ViTBlock(nn.Module):
    """Pre-norm transformer block with a fused qkv projection and the exact GELU. [B, L, D] -> ([B, L, D], None) for `nn.scan`."""

    cfg: ViTConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, None]:
        c = self.cfg
        norm = dict(eps=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype)

        h_BLD = LayerNorm(name="norm1", **norm)(x_BLD)
        # One projection to (q, k, v), heads, head width: the order in which the released weights stack their rows.
        qkv_BLSNH = linear(c, "qkv", (3, c.heads, c.head_dim), ("embed", None, "heads", "head_dim"))(h_BLD)
        qkv_BLSNH = constrain(qkv_BLSNH, "batch", "length", None, "heads", "head_dim", name="vit qkv")
        q_BLNH, k_BLNH, v_BLNH = (qkv_BLSNH[:, :, i] for i in range(3))
        h_BLNH = attend(q_BLNH, k_BLNH, v_BLNH, scale=c.head_dim**-0.5, kind=c.attention, query_chunk=c.query_chunk)
        x_BLD = x_BLD + linear(c, "proj", c.width, ("heads", "head_dim", "embed"), contract=2)(h_BLNH)

        h_BLD = LayerNorm(name="norm2", **norm)(x_BLD)
        # The erf form: SigLIP's own code uses the tanh form, the released tokenizer does not.
        h_BLF = jax.nn.gelu(linear(c, "fc1", c.mlp, ("embed", "mlp"))(h_BLD), approximate=False)
        x_BLD = x_BLD + linear(c, "fc2", c.width, ("mlp", "embed"))(h_BLF)
        return constrain(x_BLD, "batch", "length", "residual", name="vit residual"), None


class ViT(nn.Module):
    """Pixels [B, H, W, 3] in [-1, 1] -> features [B, Y, X, D], Y = H / patch, X = W / patch: the output of the last block.

    Raises:
      ValueError: a side is not a multiple of the patch.
    """

    cfg: ViTConfig

    @nn.compact
    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        c = self.cfg
        B, H, W, _ = pixels_BHWC.shape
        if H % c.patch or W % c.patch:
            raise ValueError(f"image of {H} x {W} pixels does not divide into patches of {c.patch}; use data.preprocess")
        x_BYXD = Conv(c.width, c.patch, c.patch, dtype=c.dtype, param_dtype=c.param_dtype, name="patch_embed")(pixels_BHWC)
        shape = (c.pos_grid, c.pos_grid, c.width)
        table_GGD = self.param("pos_embed", named(nn.initializers.normal(0.02), None, None, "embed"), shape, c.param_dtype)
        x_BYXD = x_BYXD + resize_positions(table_GGD, *x_BYXD.shape[1:3]).astype(c.dtype)
        x_BLD = constrain(x_BYXD.reshape(B, -1, c.width), "batch", "length", "residual", name="vit input")

        x_BLD, _ = stacked(ViTBlock, c.layers, c.remat)(c, name="blocks")(x_BLD)
        return x_BLD.reshape(x_BYXD.shape)
