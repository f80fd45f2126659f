"""Vocabulary heads, and log-probabilities under them, computed in chunks of the sequence so that no [B, L, V] array exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.layers import Dtype, named
from xomni_jax.sharding.rules import constrain


class Head(nn.Module):
    """An untied vocabulary head without bias, kernel [D, V]. [..., D] -> float32 logits [..., rows].

    Attributes:
      features: D, the model width. vocab: V, all ids. dtype, param_dtype: of the computation and of the parameters.
    """

    features: int
    vocab: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        init = named(nn.initializers.normal(0.02), "embed", "vocab")
        self.kernel = self.param("kernel", init, (self.features, self.vocab), self.param_dtype)

    def weight(self, rows: int | None = None) -> jax.Array:
        """The kernel of the first `rows` ids, [D, rows]; see `gathered_kernel`."""
        return gathered_kernel(self.kernel, self.dtype, rows)

    def __call__(self, x: jax.Array, rows: int | None = None) -> jax.Array:
        """Float32 logits of the first `rows` ids (all without it)."""
        return head_logits(x, self.weight(rows))


def gathered_kernel(kernel_DV: jax.Array, dtype: Dtype, rows: int | None = None) -> jax.Array:
    """A head's kernel [D, V] cut to the first `rows` ids, in the compute dtype and gathered over D.

    Call it once, before a loop over chunks, microbatches or steps: inside the loop the compiler would gather the kernel every time.
    """
    return constrain(kernel_DV.astype(dtype)[:, :rows], None, "vocab", name="head")


def head_kernel(params: Any, which: str, cfg: Any) -> jax.Array:
    """Kernel [D, V] of the "text" or "image" head of an `ARTransformer` of this config; see `gathered_kernel`.

    Does nothing where the parameters hold it in this form already (`with_image_head`, or a sampler's parameters).
    """
    name, rows = ("lm_head", cfg.vocab_size) if which == "text" else ("mm_head", cfg.image_vocab_size)
    with jax.named_scope("head_kernel"):
        return gathered_kernel(params[name]["kernel"], cfg.dtype, rows)


def with_image_head(params: Any, cfg: Any) -> Any:
    """The parameters with the image head's kernel replaced by `head_kernel`'s, which is then gathered once for all later uses."""
    return {**params, "mm_head": {"kernel": head_kernel(params, "image", cfg)}}


def head_logits(x: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """[..., D] x [D, V] -> logits [..., V], accumulated and returned in float32."""
    return jnp.einsum("...D,DV->...V", x.astype(kernel_DV.dtype), kernel_DV, preferred_element_type=jnp.float32)


def token_logp(logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `targets` and entropy under softmax(logits), renormalised over `mask` when given.

    Args:
      logits: [..., V], already divided by the temperature.
      targets: [...] ids; those outside the vocabulary give finite, undefined values, which the caller masks.
      mask: [..., V] bool or None. A target outside it has a log-probability of about the float32 minimum.

    Returns:
      logp [...] and entropy [...] in nats, float32.
    """
    z = logits.astype(jnp.float32)
    # A finite minimum: an -inf would turn 0 * z of the entropy, and its gradient, into NaN.
    masked = z if mask is None else jnp.where(mask, z, jnp.finfo(jnp.float32).min)
    lse = jax.nn.logsumexp(masked, axis=-1)
    picked = jnp.take_along_axis(masked, jnp.clip(targets, 0, z.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    p = jnp.exp(masked - lse[..., None])
    mean = jnp.sum(p * (z if mask is None else jnp.where(mask, z, 0.0)), axis=-1)
    return picked - lse, lse - mean


def map_chunks(fn: Callable[..., Any], arrays: Sequence[jax.Array], chunk: int) -> Any:
    """fn(*arrays) computed in chunks along axis 1, each recomputed in the backward pass.

    Args:
      fn: arrays [B, chunk, ...] -> tree of arrays [B, chunk, ...], every position on its own. The last chunk is padded with zeros.
      arrays: each [B, L, ...].
      chunk: positions per chunk; 0 takes all at once, without recomputation.

    Returns:
      The tree of fn's outputs [B, L, ...].
    """
    length = arrays[0].shape[1]
    if not chunk:
        return fn(*arrays)
    if chunk >= length:
        return jax.checkpoint(fn)(*arrays)
    n = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, n * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    def join(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], n * chunk, *y.shape[3:])[:, :length]

    out = jax.lax.map(lambda xs: jax.checkpoint(fn, prevent_cse=False)(*xs), tuple(split(x) for x in arrays))
    return jax.tree.map(join, out)


def select(x_BLD: jax.Array, positions_BM: jax.Array) -> jax.Array:
    """Rows of a sequence by position: [B, L, D], [B, M] -> [B, M, D]. Positions outside 0..L-1 are clamped (mask them later)."""
    positions_BM = jnp.clip(positions_BM, 0, x_BLD.shape[1] - 1)
    return jnp.take_along_axis(x_BLD, positions_BM[:, :, None], axis=1)


def head_logp(
    model: nn.Module, params: Any, which: str, hidden_BMD: jax.Array, targets_BM: jax.Array, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of targets under the "text" or the "image" head of an `ARTransformer`.

    Args:
      hidden_BMD: outputs of the model at the positions that predict the targets (see `select`).
      targets_BM: text ids or 0-based image codes; others give finite, undefined values, which the caller masks.
      chunk: positions at a time; bounds the logits to [B, chunk, V].

    Returns:
      (logp [B, M], entropy [B, M]), float32.
    """
    kernel_DV = head_kernel(params, which, model.cfg)
    return map_chunks(lambda h, y: token_logp(head_logits(h, kernel_DV), y), (hidden_BMD, targets_BM), chunk)
