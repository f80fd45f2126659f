"""Softmax attention with float32 scores, and the scan that stacks equal blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

REMAT = ("none", "full", "dots")


def attend(
    q_BLNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, scale: float, bias: jax.Array | None = None, query_chunk: int = 0
) -> jax.Array:
    """softmax(q k^T * scale + bias) v, scores and softmax in float32; [B, L, N, H] -> [B, L, N, H] in v's dtype.

    Args:
      bias: float32, broadcastable to [B, N, L, S]; not with `query_chunk`.
      query_chunk: queries per step; 0 takes all at once. With chunks the [L, S] scores never exist whole, neither forward nor backward:
        at 5,184 + 512 tokens and 24 heads they would be 3.1 GB per picture.
    """

    def rows(q_BLNH):
        s_BNLS = jnp.einsum("BLNH,BSNH->BNLS", q_BLNH, k_BSNH, preferred_element_type=jnp.float32) * scale
        s_BNLS = s_BNLS if bias is None else s_BNLS + bias
        # Normalised after the product with v, on H values per query instead of S: half the time of a plain softmax on a CPU.
        p_BNLS = jnp.exp(s_BNLS - jax.lax.stop_gradient(jnp.max(s_BNLS, axis=-1, keepdims=True)))
        total_BLN1 = jnp.sum(p_BNLS, axis=-1).swapaxes(1, 2)[..., None]
        y_BLNH = jnp.einsum("BNLS,BSNH->BLNH", p_BNLS.astype(v_BSNH.dtype), v_BSNH, preferred_element_type=jnp.float32)
        return (y_BLNH / total_BLN1).astype(v_BSNH.dtype)

    B, L, N, H = q_BLNH.shape
    if not query_chunk or query_chunk >= L:
        return rows(q_BLNH)
    if bias is not None:
        raise ValueError("attend: a bias is not supported together with query_chunk; leave one of them out")
    chunks = -(-L // query_chunk)
    # Padded query rows give finite values that are cut off below.
    q_BLNH = jnp.pad(q_BLNH, ((0, 0), (0, chunks * query_chunk - L), (0, 0), (0, 0)))
    q_by_chunk = q_BLNH.reshape(B, chunks, query_chunk, N, H).swapaxes(0, 1)
    y_by_chunk = jax.lax.map(jax.checkpoint(rows), q_by_chunk)
    return y_by_chunk.swapaxes(0, 1).reshape(B, chunks * query_chunk, N, H)[:, :L]


def stacked(block: type[nn.Module], length: int, remat: str, broadcast: int = 0, unroll: int = 1) -> type[nn.Module]:
    """`length` equal blocks as one scan over stacked parameters.

    Args:
      block: a module whose `__call__(carry, *broadcast_inputs)` returns `(carry, None)`.
      remat: "none" keeps all activations, "full" recomputes each block in the backward pass, "dots" keeps its matrix products.
      broadcast: number of further inputs, given to every block alike.
      unroll: blocks per loop step; the tiny presets unroll whole stacks, which a CPU runs without loop overhead.
    """
    if remat == "full":
        block = nn.remat(block, prevent_cse=False)
    elif remat == "dots":
        block = nn.remat(block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=unroll,
    )


def check_remat(model: str, remat: str) -> None:
    """Raises ValueError unless `remat` is one of REMAT."""
    if remat not in REMAT:
        raise ValueError(f"{model}.remat={remat!r} is unknown; choose one of {', '.join(REMAT)}")
