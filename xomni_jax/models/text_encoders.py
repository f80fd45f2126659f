"""The decoder's two text encoders: T5 v1.1 (the sequence) and CLIP's text tower (the pooled vector)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xomni_jax.models.attention import attend
from xomni_jax.models.layers import Embed, LayerNorm, RMSNorm, linear, named
from xomni_jax.models.stack import StackConfig, stacked
from xomni_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class T5Config(StackConfig):
    """Sizes of the T5 encoder.

    Attributes:
      vocab_size: ids
      d_model: width of the residual stream
      n_layers: number of layers
      n_heads: attention heads
      head_dim: width of one head; heads need not fill the width
      mlp_dim: width of the MLP's hidden layer
      n_buckets: buckets of relative positions
      max_distance: distance from which all positions share a bucket
      int8: kernels are stored in 8 bits, for inference; see `models.int8`
    """

    vocab_size: int = 32_128
    d_model: int = 4096
    n_layers: int = 24
    n_heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10_240
    n_buckets: int = 32
    max_distance: int = 128
    int8: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.n_buckets % 4 or self.max_distance <= self.n_buckets // 4:
            raise ValueError(f"t5.n_buckets={self.n_buckets} must be a multiple of 4 and below 4 x max_distance={self.max_distance}")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(StackConfig):
    """Sizes of CLIP's text tower.

    Attributes:
      vocab_size: ids
      d_model: width of the residual stream
      n_layers: number of layers
      n_heads: attention heads
      mlp_dim: width of the MLP's hidden layer
      max_length: learned positions
      eos_id: id whose first position gives the pooled vector
      int8: kernels are stored in 8 bits, for inference; see `models.int8`
    """

    vocab_size: int = 49_408
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 77
    eos_id: int = 49_407
    int8: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(f"clip.d_model={self.d_model} does not divide into n_heads={self.n_heads}; change one of them")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"clip.eos_id={self.eos_id} lies outside the vocabulary of {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


T5_PRESETS: dict[str, T5Config] = {
    "t5-v1.1-xxl": T5Config(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "tiny": T5Config(vocab_size=384, d_model=64, n_layers=2, n_heads=4, head_dim=16, mlp_dim=128),
}
CLIP_PRESETS: dict[str, CLIPTextConfig] = {
    "clip-l": CLIPTextConfig(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "tiny": CLIPTextConfig(vocab_size=384, d_model=64, n_layers=2, n_heads=4, mlp_dim=256, max_length=32, eos_id=381),
}


def relative_buckets(L: int, n_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket [L, L] of each (query, key): half for keys ahead; small distances exact, larger ones logarithmic, far ones alike."""
    distance = np.arange(L)[None] - np.arange(L)[:, None]
    half, exact = n_buckets // 2, n_buckets // 4
    ahead, distance = half * (distance > 0), np.abs(distance)
    # float32 as in the released code, so that a distance at a bucket's edge falls on the same side.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact) * (half - exact)
    far = np.minimum(exact + ratio.astype(np.float32).astype(np.int32), half - 1)
    return (ahead + np.where(distance < exact, distance, far)).astype(np.int32)


class SelfAttention(nn.Module):
    """Multi-head self-attention of either encoder, [B, L, D] -> [B, L, D]; `bias` is added to the scores, before the softmax."""

    cfg: T5Config | CLIPTextConfig
    scale: float
    use_bias: bool
    q_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x_BLD: jax.Array, bias_NLL: jax.Array) -> jax.Array:
        c = self.cfg

        def heads(name, **kw):
            y_BLNH = linear(c, name, (c.n_heads, c.head_dim), ("embed", "heads", "head_dim"), bias=self.use_bias, **kw)(x_BLD)
            return constrain(y_BLNH, "batch", "length", "heads", "head_dim", name=f"text/{name}")

        q, k, v = heads("q_proj", init=self.q_init), heads("k_proj"), heads("v_proj")
        y_BLNH = attend(q, k, v, scale=self.scale, bias=bias_NLL)
        return linear(c, "out", c.d_model, ("heads", "head_dim", "embed"), contract=2, bias=self.use_bias)(y_BLNH)


class T5Block(nn.Module):
    """Pre-RMSNorm attention without 1 / sqrt(head_dim), pre-RMSNorm gated GELU (tanh form); no biases."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x_BLD, bias_NLL):
        """([B, L, D], [N, L, L]) -> ([B, L, D], None), the form of `stack.stacked`."""
        c = self.cfg
        h_BLD = RMSNorm(1e-6, c.dtype, c.param_dtype, name="attention_norm")(x_BLD)
        q_init = nn.initializers.variance_scaling(1 / c.head_dim, "fan_in", "normal")  # in place of the missing 1 / sqrt(head_dim)
        x_BLD = x_BLD + SelfAttention(c, 1.0, False, q_init, name="attention")(h_BLD, bias_NLL)
        h_BLD = RMSNorm(1e-6, c.dtype, c.param_dtype, name="mlp_norm")(x_BLD)
        gate_BLF = nn.gelu(linear(c, "gate", c.mlp_dim, ("embed", "mlp"), bias=False)(h_BLD), approximate=True)
        h_BLF = gate_BLF * linear(c, "up", c.mlp_dim, ("embed", "mlp"), bias=False)(h_BLD)
        x_BLD = x_BLD + linear(c, "down", c.d_model, ("mlp", "embed"), bias=False)(h_BLF)
        return constrain(x_BLD, "batch", "length", "residual", name="t5/residual"), None


class T5Encoder(nn.Module):
    """T5 v1.1 encoder: ids [B, L] -> hidden [B, L, D]. As in FLUX, padding is attended like any other token."""

    cfg: T5Config

    @nn.compact
    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        c, L = self.cfg, ids_BL.shape[1]
        # The table of T5 is drawn at scale 1: without position embeddings or input scaling the residual stream starts from it alone.
        x_BLD = Embed(c.vocab_size, c.d_model, c.dtype, c.param_dtype, nn.initializers.normal(1.0), name="embed")(ids_BL)
        init = named(nn.initializers.normal(c.d_model**-0.5), None, "heads")
        table = self.param("relative_bias", init, (c.n_buckets, c.n_heads), c.param_dtype)
        bias_NLL = table.astype(jnp.float32)[relative_buckets(L, c.n_buckets, c.max_distance)].transpose(2, 0, 1)
        x_BLD = constrain(x_BLD, "batch", "length", "residual", name="t5/embed")
        x_BLD, _ = stacked(T5Block, c.n_layers, c.remat, (nn.broadcast,))(c, name="layers")(x_BLD, bias_NLL)
        return RMSNorm(1e-6, c.dtype, c.param_dtype, name="final_norm")(x_BLD)


class CLIPBlock(nn.Module):
    """Pre-LayerNorm causal attention, pre-LayerNorm MLP with quick-GELU, x * sigmoid(1.702 x)."""

    cfg: CLIPTextConfig

    @nn.compact
    def __call__(self, x_BLD, mask_LL):
        """([B, L, D], [L, L] added to the scores) -> ([B, L, D], None), the form of `stack.stacked`."""
        c = self.cfg
        h_BLD = LayerNorm(1e-5, True, c.dtype, c.param_dtype, name="attention_norm")(x_BLD)
        x_BLD = x_BLD + SelfAttention(c, c.head_dim**-0.5, True, name="attention")(h_BLD, mask_LL)
        h_BLD = LayerNorm(1e-5, True, c.dtype, c.param_dtype, name="mlp_norm")(x_BLD)
        h_BLF = linear(c, "up", c.mlp_dim, ("embed", "mlp"))(h_BLD)
        h_BLF = h_BLF * nn.sigmoid(1.702 * h_BLF)
        x_BLD = x_BLD + linear(c, "down", c.d_model, ("mlp", "embed"))(h_BLF)
        return constrain(x_BLD, "batch", "length", "residual", name="clip/residual"), None


class CLIPTextEncoder(nn.Module):
    """CLIP's text tower: ids [B, L] -> (hidden [B, L, D], pooled [B, D]).

    Pooled is the hidden state at the first end-of-text token (the first position where there is none).

    Raises:
      ValueError: more tokens than positions.
    """

    cfg: CLIPTextConfig

    @nn.compact
    def __call__(self, ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, L = self.cfg, ids_BL.shape[1]
        if L > c.max_length:
            raise ValueError(f"clip: {L} tokens, the model has {c.max_length} positions; truncate the prompt")
        x_BLD = Embed(c.vocab_size, c.d_model, c.dtype, c.param_dtype, name="embed")(ids_BL)
        positions = self.param("positions", named(nn.initializers.normal(0.01), None, "embed"), (c.max_length, c.d_model), c.param_dtype)
        x_BLD = constrain(x_BLD + positions[:L].astype(c.dtype), "batch", "length", "residual", name="clip/embed")
        mask_LL = np.where(np.tri(L, dtype=bool), 0.0, np.finfo(np.float32).min).astype(np.float32)
        x_BLD, _ = stacked(CLIPBlock, c.n_layers, c.remat, (nn.broadcast,))(c, name="layers")(x_BLD, mask_LL)
        x_BLD = LayerNorm(1e-5, True, c.dtype, c.param_dtype, name="final_norm")(x_BLD)
        first_B = jnp.argmax(ids_BL == c.eos_id, axis=1)
        return x_BLD, jnp.take_along_axis(x_BLD, first_B[:, None, None], axis=1)[:, 0]
