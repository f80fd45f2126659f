"""Splash attention, the fused TPU kernel of jax, on sharded batches of any length and head width."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from xomni_jax.sharding.rules import activation_spec

LANES = 128  # of a vector register; lengths and head widths are padded to a multiple
BLOCKS = (1024, 896, 768, 640, 512, 384)  # queries or keys per block, largest first; 1,024 x 1,024 float32 scores fit into VMEM everywhere


def block_of(length: int) -> int:
    """Block size that pads `length` least, the largest of equals; a short sequence is one block."""
    if length <= BLOCKS[0]:
        return -(-length // LANES) * LANES
    return min(BLOCKS, key=lambda block: -(-length // block) * block)


def splash_attention(
    q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, *, scale: float, causal: bool, segments_BL: jax.Array | None = None
) -> jax.Array:
    """Self-attention split over batch and heads of the mesh in scope; arguments as for `attention.attend`. -> [B, L, N, H].

    The kernel runs where the mesh is of TPUs and is interpreted elsewhere, slowly: that is for tests.
    """
    mesh, L = jax.sharding.get_abstract_mesh(), q_BLNH.shape[1]
    pad = -L % block_of(L)
    if segments_BL is None and pad and not causal:  # causal queries do not see the padding, which comes last
        segments_BL = jnp.ones(q_BLNH.shape[:2], jnp.int32)
    specs = tuple(
        activation_spec("attention", x.shape, ("batch", "length", axis, "head_dim"), mesh)
        for x, axis in ((q_BLNH, "heads"), (k_BLKH, "kv_heads"), (v_BLKH, "kv_heads"))
    )
    arrays = (q_BLNH, k_BLKH, v_BLKH)
    if segments_BL is not None:
        arrays, specs = (*arrays, segments_BL), (*specs, activation_spec("segments", segments_BL.shape, ("batch", "length"), mesh))
    shard = functools.partial(_shard, scale=scale, causal=causal, interpret=mesh.abstract_device.platform != "tpu")
    # The partitioner cannot split Mosaic kernels, and they have no rule for varying axes.
    return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _shard(q_BLNH, k_BLKH, v_BLKH, segments_BL=None, *, scale: float, causal: bool, interpret: bool):
    """One device's rows and heads."""
    L, N, H = q_BLNH.shape[1:]
    block = block_of(L)
    pad = -L % block

    def padded(x_BLNH):
        return jnp.pad(x_BLNH, ((0, 0), (0, pad), (0, 0), (0, -H % LANES))).swapaxes(1, 2)

    # The kernel does not scale. Scaled in float32, so that q is rounded to bfloat16 only once more.
    q_BNLH = padded((q_BLNH.astype(jnp.float32) * scale).astype(q_BLNH.dtype))
    segments = None
    if segments_BL is not None:
        segments_BL = jnp.pad(segments_BL, ((0, 0), (0, pad)))
        segments = kernels.SegmentIds(segments_BL, segments_BL)
    mask = (kernels.CausalMask if causal else kernels.FullMask)((L + pad, L + pad))
    sizes = kernels.BlockSizes(*(block,) * 8)
    make = kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    y_BNLH = jax.vmap(make)(q_BNLH, padded(k_BLKH), padded(v_BLKH), segments)
    return y_BNLH.swapaxes(1, 2)[:, :L, :, :H]
