"""Key-value caches. A pass only reads them, and its new keys and values are written once, for all layers, at its end.

A cache that the scan over layers carried and updated, or took and returned, would be copied whole in every step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.models.attention import on_kernels
from xomni_jax.models.decode_attention import TOKENS
from xomni_jax.models.transformer import KV, ARConfig, ARTransformer
from xomni_jax.sharding.rules import constrain, spec_for

PROMPT_AXES = ("layers", "batch", "kv_heads", "cache", "head_dim")
GENERATED_AXES = ("layers", "batch", None, "kv_heads", "cache", "head_dim")


@struct.dataclass
class PromptCache:
    """Keys and values of P prompts, which all rollouts of a prompt share.

    Attributes:
      kv: {stack: (k, v)}, each [layers, P, K, S, H], rotary positions applied.
      lengths_P: real tokens of each prompt; later entries are padding, which no token attends to.
    """

    kv: KV
    lengths_P: jax.Array


@struct.dataclass
class GeneratedCache:
    """Keys and values of the tokens generated so far, R rollouts of P prompts.

    Attributes:
      kv: {stack: (k, v)}, each [layers, P, R, K, T, H].
      column: int32, tokens of each row [P, R]; a scalar as long as all have equally many, because a write is then one slice.
    """

    kv: KV
    column: jax.Array

    @classmethod
    def empty(cls, cfg: ARConfig, prompts: int, rollouts: int, tokens: int, vision: bool = True) -> GeneratedCache:
        """A cache for at least `tokens` tokens in the compute dtype; with `vision=False` of the language layers alone."""

        # The TPU kernels need a whole number of blocks.
        tokens += -tokens % TOKENS if on_kernels(cfg.attention) else 0

        def zeros(layers: int) -> jax.Array:
            shape = (layers, prompts, rollouts, cfg.n_kv_heads, tokens, cfg.head_dim)
            return constrain(jnp.zeros(shape, cfg.dtype), *GENERATED_AXES, name="generated cache")

        stacks = cfg.layers if vision else {"language": cfg.n_language_layers}
        return cls({name: (zeros(n), zeros(n)) for name, n in stacks.items()}, jnp.int32(0))

    def write(self, new: KV) -> GeneratedCache:
        """Adds W tokens to every row: `new` = {stack: (k, v)} of [layers, P, W * R, K, H]."""

        def aligned(cache: jax.Array, x: jax.Array) -> jax.Array:
            n, P, R, K, _, H = cache.shape
            return jnp.moveaxis(x.reshape(n, P, -1, R, K, H), 2, 4).astype(cache.dtype)

        new, put = jax.tree.map(aligned, self.kv, new), functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=4)
        if self.column.ndim == 0:
            kv = jax.tree.map(lambda cache, x: put(cache, x, self.column), self.kv, new)
        else:
            kv = _write_rows(self.kv, new, self.column)
        return GeneratedCache(kv, self.column + jax.tree.leaves(new)[0].shape[4])


def _write_rows(kv: KV, new: KV, column_PR: jax.Array) -> KV:
    """Writes [layers, P, R, K, W, H] at the column of each row, row after row in place. A scatter would copy the cache."""

    def write(kv: KV, new: KV, column_PR: jax.Array) -> KV:
        P, R = column_PR.shape  # of one device

        def row(i: jax.Array, kv: KV) -> KV:
            p, r = i // R, i % R

            def put(cache: jax.Array, x: jax.Array) -> jax.Array:
                x = jax.lax.dynamic_slice(x, (0, p, r, 0, 0, 0), (x.shape[0], 1, 1, *x.shape[3:]))
                return jax.lax.dynamic_update_slice(cache, x, (0, p, r, 0, column_PR[p, r], 0))

            return jax.tree.map(put, kv, new)

        return jax.lax.fori_loop(0, P * R, row, kv)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return write(kv, new, column_PR)
    specs = jax.tree.map(lambda x: spec_for("generated cache", x.shape, GENERATED_AXES, mesh), (kv, new))
    rows = spec_for("columns", column_PR.shape, ("batch", None), mesh)
    return jax.shard_map(write, mesh=mesh, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)(kv, new, column_PR)


def prefill(model: ARTransformer, params, ids_PS: jax.Array, lengths_P: jax.Array) -> tuple[jax.Array, PromptCache]:
    """Runs right-padded prompts. Returns the normed hidden state [P, D] at each last real token, and the cache."""
    hidden_PD, kv = model.apply({"params": params}, ids_PS, lengths_P, method="prefill")
    kv = jax.tree.map(lambda x: constrain(x, *PROMPT_AXES, name="prompt cache"), kv)
    return hidden_PD, PromptCache(kv, lengths_P)


def extend(
    model: ARTransformer, params, ids_PWR: jax.Array, prompt: PromptCache, generated: GeneratedCache, moved: Any = None
) -> tuple[jax.Array, GeneratedCache]:
    """Runs W tokens of every rollout, ids [P, W, R]. Returns the normed hidden states [P, W, R, D] and the cache with them written.

    `moved`: see `ARTransformer.extend`.
    """
    args = ids_PWR, prompt.kv, prompt.lengths_P, generated.kv, generated.column, moved
    hidden_PWRD, new = model.apply({"params": params}, *args, method="extend")
    return hidden_PWRD, generated.write(new)
