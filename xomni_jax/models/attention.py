"""Attention of every model behind one interface."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from xomni_jax.models.splash import splash_attention
from xomni_jax.models.vocab_heads import map_chunks

ATTENTION = ("auto", "plain", "splash")


def attend(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float,
    kind: str = "plain",
    causal: bool = False,
    segments_BL: jax.Array | None = None,
    bias: jax.Array | None = None,
    query_chunk: int = 0,
) -> jax.Array:
    """softmax(q k^T * scale + bias) v with float32 scores; N is a multiple of K. -> [B, L, N, H] in v's dtype.

    Args:
      kind: "plain" computes the scores with XLA; "splash" is the TPU kernel, which never writes them to memory (without a bias, and under
        `jax.set_mesh`; interpreted where the mesh is not of TPUs); "auto" takes splash exactly on a mesh of TPUs.
      causal: a query sees keys up to its own index.
      segments_BL: a token sees its own segment only; 0 marks padding, whose outputs are finite but undefined.
      bias: float32, broadcastable to [B, N, L, S]; plain only, not with `query_chunk`.
      query_chunk: queries per step of plain; 0 takes all at once. With chunks the [L, S] scores never exist whole, neither forward nor
        backward: at 5,184 + 512 tokens and 24 heads they would be 3.1 GB per image.
    """
    if bias is None and on_kernels(kind):
        return splash_attention(q_BLNH, k_BSKH, v_BSKH, scale=scale, causal=causal, segments_BL=segments_BL)
    return plain_attention(q_BLNH, k_BSKH, v_BSKH, scale, causal, segments_BL, bias, query_chunk)


def on_kernels(kind: str) -> bool:
    """Whether a model of this `attention` runs on the TPU kernels under the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    # Initialisation traces the model without a mesh, and `shard_map` needs one.
    return not mesh.empty and (kind == "splash" or (kind == "auto" and mesh.abstract_device.platform == "tpu"))


def plain_attention(q_BLNH, k_BSKH, v_BSKH, scale, causal, segments_BL, bias, query_chunk) -> jax.Array:
    """`attend` by matrix products; see there."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    # With one query head per KV head the axis G is left out: it would make a CPU transpose.
    G, over, q = ("", (1,), q_BLNH) if N == K else ("G", (1, 2), q_BLNH.reshape(B, L, K, N // K, H))
    if bias is not None and G:
        bias = jnp.broadcast_to(bias, (*bias.shape[:-3], N, L, S)).reshape(*bias.shape[:-3], K, N // K, L, S)

    limits = []  # (an index of each query, the function from indices of queries to the mask of keys that they see)
    if causal:
        limits.append((jnp.broadcast_to(jnp.arange(L), (B, L)), lambda row_BC: row_BC[:, :, None] >= jnp.arange(S)))
    if segments_BL is not None:
        key_B1S = segments_BL[:, None]
        limits.append((segments_BL, lambda segment_BC: (segment_BC[:, :, None] == key_B1S) & (key_B1S > 0)))

    def rows(q, *indices):
        # float32 scores: over 5,184 keys a bf16 softmax drops small weights and drifts from the released log-probs.
        s_BKGCS = jnp.einsum(f"BCK{G}H,BSKH->BK{G}CS", q, k_BSKH, preferred_element_type=jnp.float32) * scale
        s_BKGCS = s_BKGCS if bias is None else s_BKGCS + bias
        if limits:
            mask_BCS = functools.reduce(jnp.logical_and, [sees(index) for index, (_, sees) in zip(indices, limits)])
            # A finite minimum, so that a fully masked row (padding) has finite values and no NaN gradients.
            s_BKGCS = jnp.where(jnp.expand_dims(mask_BCS, over), s_BKGCS, jnp.finfo(jnp.float32).min)
        # Normalised after the product with v, on H values per query instead of S: a CPU takes half the time of a plain softmax.
        p_BKGCS = jnp.exp(s_BKGCS - jax.lax.stop_gradient(jnp.max(s_BKGCS, axis=-1, keepdims=True)))
        total_BCKG1 = jnp.moveaxis(jnp.sum(p_BKGCS, axis=-1), -1, 1)[..., None]
        y_BCKGH = jnp.einsum(f"BK{G}CS,BSKH->BCK{G}H", p_BKGCS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
        return (y_BCKGH / total_BCKG1).astype(v_BSKH.dtype)

    return map_chunks(rows, (q, *(index for index, _ in limits)), query_chunk).reshape(B, L, N, v_BSKH.shape[-1])


def check_attention(model: str, attention: str) -> None:
    """Raises ValueError unless `attention` is one of ATTENTION; `model` names the config."""
    if attention not in ATTENTION:
        raise ValueError(f"{model}.attention={attention!r} is unknown; choose one of {', '.join(ATTENTION)}")
