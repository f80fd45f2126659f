"""The understanding tasks that train the tokenizer (X-Omni section 3.1).

A causal language model answers questions from an image's quantised semantics alone. A linear classifier labels every semantic vector: a
spatially dense loss, which small models need beside the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.layers import Embed, Projection, RMSNorm
from xomni_jax.models.quantizer import usage_metrics
from xomni_jax.models.siglip_vq import SigLIPVQ, SigLIPVQConfig
from xomni_jax.models.stack import stacked
from xomni_jax.models.transformer import ARConfig, Context, DecoderLayer
from xomni_jax.models.vocab_heads import Head, head_logits, map_chunks, token_logp
from xomni_jax.sharding.rules import constrain
from xomni_jax.training.accumulate import join_rows, summed


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the language model that reads semantics: Qwen2 layers, text ids only.

    Attributes:
      vocab_size: text ids
      d_model: width of the layers
      mlp_dim: width of the MLP
      n_heads: query heads
      n_kv_heads: key and value heads
      head_dim: width of a head
      n_layers: layers
      dense_classes: labels a token can have, 0 ("nothing") included; 0: no dense task; the tokenizer's stage sets it
      rope_theta: base of the rotary positions
      rms_eps: epsilon of the norms
      chunk: positions whose logits exist at a time; 0: all
      dtype: number format of the computation
      param_dtype: number format of the parameters
      remat: what the backward pass computes again: none, full or dots
    """

    vocab_size: int
    d_model: int = 96
    mlp_dim: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 24
    n_layers: int = 2
    dense_classes: int = 0
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    chunk: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @property
    def decoder(self) -> ARConfig:
        """The same sizes as the transformer's layers want them; refuses what they refuse."""
        names = ("vocab_size", "d_model", "mlp_dim", "n_heads", "n_kv_heads", "head_dim", "rope_theta", "rms_eps")
        names += ("dtype", "param_dtype", "remat")
        shared = {name: getattr(self, name) for name in names}
        stacks = dict(n_language_layers=self.n_layers, n_adapter_layers=0, n_head_layers=0)
        return ARConfig(mm_vocab_size=0, image_vocab_size=0, **stacks, **shared)


PRESETS: dict[str, ReaderConfig] = {
    "qwen2.5-1.5b": ReaderConfig(
        vocab_size=151936, d_model=1536, mlp_dim=8960, n_heads=12, n_kv_heads=2, head_dim=128, n_layers=28, chunk=512,
        dtype=jnp.bfloat16, remat="full",
    ),
    "tiny": ReaderConfig(vocab_size=384),
}  # fmt: skip


class FeatureReader(nn.Module):
    """Causal language model over semantics (row-major, as a prefix) followed by text."""

    cfg: ReaderConfig

    @nn.compact
    def __call__(self, semantics_BYXD: jax.Array, ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probability of every text token given the image and the text before it.

        Args:
          semantics_BYXD: what the tokenizer's decoder makes of an image's codes; any width.
          ids_BL: text ids, padded on the right with any id.

        Returns:
          (logp [B, L] float32, right [B, L] bool: the token is the most likely one).
        """
        c, d = self.cfg, self.cfg.decoder
        kind = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        B, prefix, L = semantics_BYXD.shape[0], semantics_BYXD.shape[1] * semantics_BYXD.shape[2], ids_BL.shape[1]

        h_BPD = semantics_BYXD.reshape(B, prefix, -1)
        h_BPD = Projection((c.mlp_dim,), ("embed", "mlp"), bias=True, name="projector_in", **kind)(h_BPD)
        h_BPD = jax.nn.gelu(h_BPD, approximate=False)
        h_BPD = Projection((c.d_model,), ("mlp", "embed"), bias=True, name="projector_out", **kind)(h_BPD)
        # Text starts at the size at which the image arrives: with the usual 0.02 a small reader ignores it for long.
        table = Embed(c.vocab_size, c.d_model, init=nn.initializers.normal(0.5), name="embed", **kind)
        x_BSD = jnp.concatenate([h_BPD, table(ids_BL)], axis=1)
        x_BSD = constrain(x_BSD, "batch", "length", "residual", name="reader input")

        S = prefix + L
        ctx = Context(jnp.broadcast_to(jnp.arange(S), (B, S)), jnp.zeros((B, S), bool))
        stack = stacked(DecoderLayer, c.n_layers, c.remat, (nn.broadcast,) * 2)(d, False, name="layers")
        x_BSD, _ = stack(x_BSD, None, ctx)
        # The last image cell predicts the first text token, the last text token predicts nothing.
        x_BLD = RMSNorm(c.rms_eps, name="norm", **kind)(x_BSD[:, prefix - 1 : -1])
        kernel_DV = Head(c.d_model, c.vocab_size, name="head", **kind).weight()

        def score(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = head_logits(x, kernel_DV)
            return token_logp(logits, ids)[0], jnp.argmax(logits, axis=-1) == ids

        return map_chunks(score, (x_BLD, ids_BL), c.chunk)


class TokenizerLearner(nn.Module):
    """The tokenizer and its readers. Parameters: {"tokenizer": SigLIPVQ's, "reader": FeatureReader's, "dense": Projection's}."""

    vq: SigLIPVQConfig
    read: ReaderConfig

    def setup(self) -> None:
        r = self.read
        self.tokenizer = SigLIPVQ(self.vq)
        self.reader = FeatureReader(r)
        if r.dense_classes:
            self.dense = Projection((r.dense_classes,), ("embed", None), bias=True, dtype=r.dtype, param_dtype=r.param_dtype)

    def __call__(self, pixels_BHWC: jax.Array, ids_BL: jax.Array, skip_B: jax.Array | None = None) -> dict[str, Any]:
        """`SigLIPVQ.__call__`'s outputs plus "logp" and "right" [B, L] of the text, "cells" [B, Y, X, classes] float32 logits."""
        out = self.tokenizer(pixels_BHWC, skip_B)
        out["logp"], out["right"] = self.reader(out["semantics"], ids_BL)
        if self.read.dense_classes:
            # A linear map, because the image decoder reads the same vectors through one.
            out["cells"] = self.dense(out["semantics"]).astype(jnp.float32)
        return out


class Weights(NamedTuple):
    """Weights of the terms of `tokenizer_loss`. `dense` is ignored by a learner without dense reading."""

    answer: float = 1.0
    dense: float = 1.0
    quantizer: float = 1.0


class Aux(NamedTuple):
    """What `tokenizer_loss` returns beside the loss.

    Attributes:
      metrics: scalars.
      usage: [V] share of positions per code, for the running average that finds dead codes.
      z: [B, Y, X, C] normalised encoder outputs, for starting the codebook and restarting codes.
    """

    metrics: dict[str, jax.Array]
    usage: jax.Array
    z: jax.Array


def masked_mean(x: jax.Array, mask: jax.Array, whole: jax.Array) -> jax.Array:
    """Sum of x over mask divided by the size of the mask `whole`, of which `mask` is a part; float32, 0 where nothing is masked in."""
    return jnp.sum(x.astype(jnp.float32) * mask.astype(jnp.float32)) / jnp.maximum(jnp.sum(whole.astype(jnp.float32)), 1.0)


def tokenizer_loss(
    params: Any,
    batch: dict[str, jax.Array],
    whole: dict[str, jax.Array],
    *,
    learner: TokenizerLearner,
    strength: float | jax.Array = 1.0,
    weights: Weights = Weights(),
) -> tuple[jax.Array, Aux]:
    """Understanding from quantised features: answers, cell labels, quantiser.

    Args:
      params: of `learner`.
      batch: "pixels" [B, H, W, 3] in [-1, 1]; "columns" [B, Y, X] int32 label per cell (dense reading only; -1: unknown);
        "ids" [B, L] int32 question and answer, padded on the right; "loss_mask" [B, L] bool, True at answer tokens;
        "skip" [B] bool, the images that skip quantisation, from `codebook.skipped_images`.
      whole: the batch, or the one that `batch` is a part of: the losses, metrics and usage of all parts add up to its own, except
        codes/{used,perplexity}.
      strength: 0..1, traced or not; of the quantiser's loss. At 0, before the codebook starts, it is not trained.

    Returns:
      The loss (float32 scalar) and `Aux` with metrics loss/{total,answer,dense,quantizer,straight_through,commitment,codebook},
      accuracy/{answer,dense,dense_labelled} and codes/{used,perplexity,skipped}.
    """
    out = learner.apply({"params": params}, batch["pixels"], batch["ids"], batch["skip"])

    share = batch["skip"].size / whole["skip"].size
    metrics = {f"loss/{name}": share * value for name, value in out["losses"].items()}
    metrics["loss/answer"] = -masked_mean(out["logp"], batch["loss_mask"], whole["loss_mask"])
    metrics["accuracy/answer"] = masked_mean(out["right"], batch["loss_mask"], whole["loss_mask"])
    total = weights.answer * metrics["loss/answer"] + weights.quantizer * strength * metrics["loss/quantizer"]
    if learner.read.dense_classes:
        labels, all_labels = batch["columns"], whole["columns"]
        right = jnp.argmax(out["cells"], axis=-1) == labels
        metrics["loss/dense"] = -masked_mean(token_logp(out["cells"], labels)[0], labels >= 0, all_labels >= 0)
        metrics["accuracy/dense"] = masked_mean(right, labels >= 0, all_labels >= 0)
        metrics["accuracy/dense_labelled"] = masked_mean(right, labels > 0, all_labels > 0)
        total = total + weights.dense * metrics["loss/dense"]
    metrics["loss/total"] = total
    metrics["codes/skipped"] = share * jnp.mean(out["skipped"].astype(jnp.float32))
    usage_V = share * out["usage"]
    return total, Aux(metrics | {f"codes/{name}": value for name, value in usage_metrics(usage_V).items()}, usage_V, out["z"])


def join_aux(stacked: Aux) -> Aux:
    """What the micro-batches of `accumulate.gradient` return, as that of the whole batch."""
    metrics, usage_V = summed((stacked.metrics, stacked.usage))
    return Aux(metrics | {f"codes/{name}": value for name, value in usage_metrics(usage_V).items()}, usage_V, join_rows(stacked.z))
