"""Vector quantisation: index backpropagation (IBQ, arXiv 2412.02692) as X-Omni trains it, straight-through as LlamaGen does (arXiv
2406.06525), and measures against unused codes.

Pure functions of arrays. `z` is always the l2-normalised encoder output; the codebook is RAW. X-Omni normalises it for the search only and
reads its rows as they are; LlamaGen reads normalised rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The default precision of a float32 matmul on TPU is bfloat16 passes, which would swap codes that lie close together.
EXACT = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """Result of quantisation.

    Attributes:
      rows: [..., C] codebook rows with the straight-through gradient (or z where skipped).
      codes: [...] int32.
      losses: the terms, unweighted ("straight_through" of IBQ, "entropy" of LlamaGen, "commitment", "codebook"), and their weighted sum
        "quantizer".
      usage: [V] float32, the share of positions that chose each code.
    """

    rows: jax.Array
    codes: jax.Array
    losses: dict[str, jax.Array]
    usage: jax.Array


def normalize(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, in float32; the gradient is finite at 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def squared_distances(z: jax.Array, codebook_VC: jax.Array) -> jax.Array:
    """[..., C] normalised outputs and the RAW codebook -> [..., V] squared distances to the normalised rows, by one matmul."""
    e_VC = normalize(codebook_VC)
    dot = jnp.einsum("...C,VC->...V", z, e_VC, precision=EXACT)
    return jnp.sum(z * z, axis=-1, keepdims=True) + jnp.sum(e_VC * e_VC, axis=-1) - 2.0 * dot


def nearest_codes(z: jax.Array, codebook_VC: jax.Array) -> jax.Array:
    """[..., C] -> [...] int32: the code whose normalised row is nearest; the lowest one of equals."""
    return jnp.argmin(squared_distances(z, codebook_VC), axis=-1).astype(jnp.int32)


def code_usage(codes: jax.Array, rows: int) -> jax.Array:
    """Share of positions per code, [rows] float32, summing to 1."""
    counts = jnp.zeros((rows,), jnp.float32).at[codes.reshape(-1)].add(1.0)
    return counts / codes.size


def usage_metrics(usage_V: jax.Array) -> dict[str, jax.Array]:
    """`used`: the fraction of codes that were chosen at all; `perplexity`: the effective number of codes."""
    entropy = -jnp.sum(usage_V * jnp.log(jnp.maximum(usage_V, 1e-12)))
    return {"used": jnp.mean(usage_V > 0), "perplexity": jnp.exp(entropy)}


def quantize_train(
    z_BYXC: jax.Array, codebook_VC: jax.Array, skip_B: jax.Array | None = None, temperature: float = 2.0, beta: float = 0.25
) -> Quantized:
    """IBQ's training pass: hard codes forward, the gradient of the soft assignment softmax(-d / temperature) backward.

    Args:
      z_BYXC: normalised encoder outputs.
      codebook_VC: raw codebook.
      skip_B: bool per image, True: its rows are z itself (quantisation skipped). Losses and codes count every image.
      temperature: of the soft assignment. beta: weight of the codebook term.
    """
    codebook_VC = codebook_VC.astype(jnp.float32)
    d_BYXV = squared_distances(z_BYXC, codebook_VC)
    codes_BYX = jnp.argmin(d_BYXV, axis=-1).astype(jnp.int32)
    soft_BYXV = jax.nn.softmax(-d_BYXV / temperature, axis=-1)
    hard_BYXC = jnp.take(codebook_VC, codes_BYX, axis=0, mode="clip")
    # (onehot - stop(soft) + soft) @ codebook, without the one-hot matrix: the lookup is the value and the codebook's gradient,
    # the soft mixture adds zero to the value and its whole gradient to the assignment.
    mixed_BYXC = jnp.einsum("BYXV,VC->BYXC", soft_BYXV, jax.lax.stop_gradient(codebook_VC), precision=EXACT)
    rows_BYXC = hard_BYXC + (mixed_BYXC - jax.lax.stop_gradient(mixed_BYXC))

    losses = {
        "straight_through": jnp.mean((rows_BYXC - z_BYXC) ** 2),
        "commitment": jnp.mean((jax.lax.stop_gradient(hard_BYXC) - z_BYXC) ** 2),
        "codebook": jnp.mean((hard_BYXC - jax.lax.stop_gradient(z_BYXC)) ** 2),
    }
    losses["quantizer"] = losses["straight_through"] + losses["commitment"] + beta * losses["codebook"]
    if skip_B is not None:
        rows_BYXC = jnp.where(skip_B[:, None, None, None], z_BYXC, rows_BYXC)
    return Quantized(rows_BYXC, codes_BYX, losses, code_usage(codes_BYX, codebook_VC.shape[0]))


def quantize_straight_through(
    z_BYXC: jax.Array, codebook_VC: jax.Array, skip_B: jax.Array | None = None, beta: float = 0.25, entropy_weight: float = 0.0
) -> Quantized:
    """LlamaGen's training pass: the nearest unit row forward, its gradient to z unchanged (VQ-VAE, arXiv 1711.00937).

    Args:
      z_BYXC: normalised encoder outputs. codebook_VC: raw codebook. skip_B: as in `quantize_train`.
      beta: weight of the commitment. entropy_weight: of the entropy of a position's soft codes minus that of their mean over positions.
    """
    d, e_VC = squared_distances(z_BYXC, codebook_VC), normalize(codebook_VC)
    codes = jnp.argmin(d, axis=-1).astype(jnp.int32)
    rows = jnp.take(e_VC, codes, axis=0, mode="clip")
    losses = {
        "commitment": jnp.mean((jax.lax.stop_gradient(rows) - z_BYXC) ** 2),
        "codebook": jnp.mean((rows - jax.lax.stop_gradient(z_BYXC)) ** 2),
    }
    losses["quantizer"] = losses["codebook"] + beta * losses["commitment"]
    if entropy_weight:
        # Temperature 0.01; 1e-5 is added to the logits of a position and to the mean probabilities, as published.
        logits_TV = -d.reshape(-1, d.shape[-1]) / 0.01
        p_TV = jax.nn.softmax(logits_TV, axis=-1)
        p_V = jnp.mean(p_TV, axis=0)
        each = -jnp.mean(jnp.sum(p_TV * jax.nn.log_softmax(logits_TV + 1e-5, axis=-1), axis=-1))
        losses["entropy"] = each + jnp.sum(p_V * jnp.log(p_V + 1e-5))
        losses["quantizer"] += entropy_weight * losses["entropy"]
    rows = z_BYXC + jax.lax.stop_gradient(rows - z_BYXC)
    if skip_B is not None:
        rows = jnp.where(skip_B[:, None, None, None], z_BYXC, rows)
    return Quantized(rows, codes, losses, code_usage(codes, codebook_VC.shape[0]))


def unit_rows(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initial codebook: random directions of length 1."""
    return normalize(jax.random.normal(key, shape)).astype(dtype)


# ------------------------------------------------------------------------------------------------ unused codes


def start_codebook(key: jax.Array, z_TC: jax.Array, rows: int) -> jax.Array:
    """Initial codebook [rows, C] of distinct encoder outputs.

    Each is drawn with probability proportional to its squared distance to those already drawn (k-means++), so that a flat background
    takes few rows and a rare glyph still gets one.

    Args:
      z_TC: normalised encoder outputs of many images (`SigLIPVQ.outputs`), T at least `rows`.

    Raises:
      ValueError: fewer outputs than rows.
    """
    if z_TC.shape[0] < rows:
        raise ValueError(f"{z_TC.shape[0]} encoder outputs cannot start a codebook of {rows} rows; pass more images")
    z_TC = z_TC.astype(jnp.float32)
    keys = jax.random.split(key, rows)

    def draw(i, carry):
        codebook_VC, nearest_T = carry
        # Where fewer distinct outputs than rows exist all distances end at 0: the floor then makes the draw uniform.
        chosen_C = z_TC[jax.random.categorical(keys[i], jnp.log(jnp.maximum(nearest_T, 1e-12)))]
        return codebook_VC.at[i].set(chosen_C), jnp.minimum(nearest_T, jnp.sum((z_TC - chosen_C) ** 2, axis=-1))

    start = jnp.zeros((rows, z_TC.shape[1]), jnp.float32), jnp.full(z_TC.shape[:1], 4.0)
    return jax.lax.fori_loop(0, rows, draw, start)[0]


def dead_codes(usage_V: jax.Array, threshold: float = 0.03) -> jax.Array:
    """Which codes are hardly chosen: bool [V], the share below `threshold` times an even share of 1 / V."""
    return usage_V < threshold / usage_V.shape[0]


def restart_dead_codes(
    key: jax.Array, codebook_VC: jax.Array, usage_V: jax.Array, z_TC: jax.Array, threshold: float = 0.03
) -> tuple[jax.Array, jax.Array]:
    """Moves dead codes onto encoder outputs that are far from all other codes.

    Args:
      usage_V: running average of `Quantized.usage`; codes below `dead_codes(usage_V, threshold)` move. Set their running usage
        to 1 / V afterwards, or they move again before they could be chosen.
      z_TC: normalised encoder outputs; each goes to at most one code, drawn by its squared distance to the nearest living row.

    Returns:
      codebook [V, C] in its dtype, and how many codes moved (int32; at most T).
    """
    V, T = codebook_VC.shape[0], z_TC.shape[0]
    dead_V = dead_codes(usage_V, threshold)
    z_TC = z_TC.astype(jnp.float32)
    d_TV = jnp.where(dead_V[None], 4.0, squared_distances(z_TC, codebook_VC))
    weight_T = jnp.log(jnp.maximum(jnp.min(d_TV, axis=-1), 1e-12))
    # Gumbel top-k: a draw without replacement, proportional to the weights.
    _, order_K = jax.lax.top_k(weight_T + jax.random.gumbel(key, (T,)), min(T, V))
    rank_V = jnp.cumsum(dead_V) - 1
    moved_V = dead_V & (rank_V < order_K.shape[0])
    fresh_VC = z_TC[order_K[jnp.clip(rank_V, 0, order_K.shape[0] - 1)]]
    codebook_VC = jnp.where(moved_V[:, None], fresh_VC.astype(codebook_VC.dtype), codebook_VC)
    return codebook_VC, jnp.sum(moved_V, dtype=jnp.int32)
