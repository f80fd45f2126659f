"""Attention of one decode step as a TPU kernel, which reads keys and values once per KV head and only the filled part of the caches.

It takes the caches of a whole stack and the index of the layer: the compiler would copy a layer's slice before passing it to a kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xomni_jax.sharding.rules import spec_for

ROWS = 8  # query heads per KV head are padded to this number, the rows of a float32 tile
TOKENS = 64  # the length of the generated cache is a multiple of this
BLOCK_BYTES = 1 << 20  # keys per grid step: enough to hide the overhead of a step, little of VMEM
ROLLOUTS = 32  # most rollouts of a prompt per grid step
PROMPT = 512  # most prompt tokens per grid step


def step_kernel(
    q_PRKGH: jax.Array,
    k_PRKH: jax.Array,
    v_PRKH: jax.Array,
    past: tuple[jax.Array, ...],
    layer: jax.Array,
    lengths_P: jax.Array,
    column_PR: jax.Array,
) -> jax.Array:
    """`cached_attention` of one token per rollout over stacked caches, split over prompts and KV heads of the mesh in scope.
    -> [P, R, K, G, H].

    Args:
      past: prompt k, v [layers, P, K, S, H] and generated k, v [layers, P, R, K, T, H], T a multiple of `TOKENS`.
      layer: scalar, the index of the layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    new, prompt = ("batch", None, "kv_heads", "head_dim"), ("layers", "batch", "kv_heads", "cache", "head_dim")
    made = ("layers", "batch", None, "kv_heads", "cache", "head_dim")
    axes = (("batch", None, "kv_heads", None, "head_dim"), new, new, prompt, prompt, made, made, (), ("batch",), ("batch", None))
    arrays = (q_PRKGH, k_PRKH, v_PRKH, *past, layer, lengths_P, column_PR)
    specs = tuple(spec_for("decode attention", x.shape, a, mesh) for x, a in zip(arrays, axes))
    shard = functools.partial(_shard, interpret=mesh.abstract_device.platform != "tpu")
    return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _largest_divisor(n: int, multiple: int, most: int) -> int:
    """The largest divisor of n that is a multiple of `multiple` and at most `most`; n itself where there is none."""
    return max((d for d in range(multiple, min(n, most) + 1, multiple) if n % d == 0), default=n)


def _shard(q_PRKGH, k_PRKH, v_PRKH, prompt_k, prompt_v, generated_k, generated_v, layer, lengths_P, column_PR, *, interpret: bool):
    """Attention of the prompts and KV heads of one device.

    Grid: prompt, KV head, part of the rollouts, block of tokens (those of the prompt first, then the generated ones).
    """
    P, R, K, G, H = q_PRKGH.shape
    S, T, rows = prompt_k.shape[3], generated_k.shape[4], -(-G // ROWS) * ROWS
    r = R if R <= ROLLOUTS else _largest_divisor(R, ROWS, ROLLOUTS)
    s = min(-(-S // 16) * 16, PROMPT)
    t = _largest_divisor(T, TOKENS, max(TOKENS, BLOCK_BYTES // (r * H * generated_k.dtype.itemsize)))
    in_prompt = -(-S // s)

    def prompt_block(p, k, _, i, layer, lengths, most):
        return layer[0], p, k, jnp.minimum(i, jnp.maximum(lengths[p] - 1, 0) // s), 0

    def generated_block(p, k, part, i, layer, lengths, most):
        # Blocks past the last filled one keep its index, and are not fetched again.
        return layer[0], p, part, k, jnp.clip(i - in_prompt, 0, jnp.maximum(most[p] - 1, 0) // t), 0

    def row_block(p, k, part, i, *_):
        return p, k, part, 0

    q_spec = pl.BlockSpec((None, None, r, rows, H), lambda p, k, part, i, *_: (p, k, part, 0, 0))
    new_spec = pl.BlockSpec((None, None, r, H), row_block)
    prompt_spec = pl.BlockSpec((None, None, None, s, H), prompt_block)
    generated_spec = pl.BlockSpec((None, None, r, None, t, H), generated_block)
    filled_spec = pl.BlockSpec((None, r * rows, 1), lambda p, k, part, *_: (p, part, 0))
    q_PKRGH = jnp.pad(jnp.moveaxis(q_PRKGH, 2, 1), ((0, 0),) * 3 + ((0, rows - G), (0, 0)))
    read = 2 * generated_k.dtype.itemsize * P * K * H * (S + R * T)
    call = pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5, in_prompt=in_prompt),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(P, K, R // r, in_prompt + T // t),
            in_specs=[filled_spec, q_spec, new_spec, new_spec, prompt_spec, prompt_spec, generated_spec, generated_spec],
            out_specs=q_spec,
            scratch_shapes=[pltpu.VMEM((r * rows, width), jnp.float32) for width in (1, 1, H)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_PKRGH.shape, v_PRKH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=4 * P * R * K * G * H * (S + T), bytes_accessed=read, transcendentals=P * R * K * G * (S + T)),
        interpret=interpret,
    )
    scalars = jnp.reshape(layer, 1), lengths_P, jnp.max(column_PR, axis=1)
    filled_PN1 = jnp.repeat(column_PR, rows, axis=1)[..., None]  # of every query row
    y_PKRGH = call(
        *scalars, filled_PN1, q_PKRGH, jnp.swapaxes(k_PRKH, 1, 2), jnp.swapaxes(v_PRKH, 1, 2), prompt_k, prompt_v, generated_k, generated_v
    )
    return jnp.moveaxis(y_PKRGH[:, :, :, :G], 1, 2)


def _kernel(layer, lengths, most, filled, q, k, v, prompt_k, prompt_v, generated_k, generated_v, y, peak, total, mean, *, scale, in_prompt):
    """Running softmax over blocks of keys. It starts from the new token's own key and value."""
    i, length = pl.program_id(3), lengths[pl.program_id(0)]
    r, rows, H = q.shape
    f32, dtype = jnp.float32, v.dtype

    @pl.when(i == 0)
    def start():
        itself = jnp.sum(q[...].astype(f32) * k[...].astype(f32)[:, None], axis=-1, keepdims=True) * scale
        peak[...], total[...] = itself.reshape(r * rows, 1), jnp.ones((r * rows, 1), f32)
        mean[...] = jnp.broadcast_to(v[...].astype(f32)[:, None], (r, rows, H)).reshape(r * rows, H)

    def add(scores, first, limit, weigh):
        """Adds a block of scores [r * rows, tokens] to the softmax; keys of index `limit`, one or one per row, and above are masked."""
        index = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(index < limit, scores * scale, jnp.finfo(f32).min)
        new = jnp.maximum(peak[...], jnp.max(scores, axis=-1, keepdims=True))
        rescale, p = jnp.exp(peak[...] - new), jnp.exp(scores - new)
        total[...] = total[...] * rescale + jnp.sum(p, axis=-1, keepdims=True)
        mean[...] = mean[...] * rescale + weigh(p)
        peak[...] = new

    at = i * prompt_k.shape[0]

    @pl.when((i < in_prompt) & (at < length))
    def prompt():
        # The rollouts of the prompt share its keys: one matrix product for all.
        q_rows = q[...].astype(f32).reshape(r * rows, H).astype(dtype)
        scores = jax.lax.dot_general(q_rows, prompt_k[...], (((1,), (1,)), ((), ())), preferred_element_type=f32)
        # The last block may reach past the end of the array, where values may be NaN and 0 x NaN is not 0.
        index = at + jax.lax.broadcasted_iota(jnp.int32, prompt_v.shape, 0)
        values = jnp.where(index < length, prompt_v[...], jnp.zeros_like(prompt_v))
        add(scores, at, length, lambda p: jnp.dot(p.astype(dtype), values, preferred_element_type=f32))

    t = generated_k.shape[1]
    behind = (i - in_prompt) * t

    @pl.when((i >= in_prompt) & (behind < most[pl.program_id(0)]))
    def generated():
        scores = jax.lax.dot_general(q[...], generated_k[...], (((2,), (2,)), ((0,), (0,))), preferred_element_type=f32)

        def weigh(p):
            p_RGT = p.reshape(r, rows, t).astype(dtype)
            return jax.lax.dot_general(p_RGT, generated_v[...], (((2,), (1,)), ((0,), (0,))), preferred_element_type=f32).reshape(
                r * rows, H
            )

        add(scores.reshape(r * rows, t), behind, filled[...], weigh)

    @pl.when(i == pl.num_programs(3) - 1)
    def end():
        y[...] = (mean[...] / total[...]).reshape(r, rows, H).astype(dtype)
