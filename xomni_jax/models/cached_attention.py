"""Attention of new tokens over a key-value cache, by matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xomni_jax.models.vocab_heads import map_chunks


def cached_attention(
    q_PLKGH: jax.Array, k_PLKH: jax.Array, v_PLKH: jax.Array, past: tuple[jax.Array, ...], lengths_P: jax.Array, column_PR: jax.Array,
    query_chunk: int = 0,
) -> jax.Array:  # fmt: skip
    """W new tokens per rollout over its prompt, its cached tokens and the new ones up to each, in one joint softmax. -> [P, L, K, G, H].

    The prompt's keys and values are read once per prompt, whatever R is. L = W * R, the rollouts of one step side by side.

    Args:
      past: prompt k, v [P, K, S, H] and generated k, v [P, R, K, T, H], of which the first `lengths_P` and `column_PR` entries are real;
        both are only read.
      query_chunk: most new tokens of a prompt, at least one of each rollout, whose scores exist at a time; 0: all.
    """
    prompt_k, prompt_v, made_k, made_v = past
    (P, R), (K, G, H) = column_PR.shape, q_PLKGH.shape[2:]
    S, T, W, f32 = prompt_k.shape[-2], made_k.shape[-2], q_PLKGH.shape[1] // R, jnp.float32
    q_PWRKGH, new_k, new_v = (x.reshape(P, W, R, *x.shape[2:]) for x in (q_PLKGH, k_PLKH, v_PLKH))
    prompt_PS, made_PRT = jnp.arange(S) < lengths_P[:, None], jnp.arange(T) < column_PR[:, :, None]

    def rows(q_PCRKGH: jax.Array, step_PC: jax.Array) -> jax.Array:
        # The steps of a rollout read the same keys as the G heads of a KV head do: M = C * G rows of one product.
        q_PRKMH, step_PM = jnp.moveaxis(q_PCRKGH, 1, 3).reshape(P, R, K, -1, H), jnp.repeat(step_PC, G, axis=1)
        in_prompt = jnp.einsum("PRKMH,PKSH->PRKMS", q_PRKMH, prompt_k, preferred_element_type=f32)
        in_made = jnp.einsum("PRKMH,PRKTH->PRKMT", q_PRKMH, made_k, preferred_element_type=f32)
        in_new = jnp.einsum("PRKMH,PWRKH->PRKMW", q_PRKMH, new_k, preferred_element_type=f32)
        in_prompt = jnp.where(prompt_PS[:, None, None, None], in_prompt, jnp.finfo(f32).min)
        in_made = jnp.where(made_PRT[:, :, None, None], in_made, jnp.finfo(f32).min)
        in_new = jnp.where((jnp.arange(W) <= step_PM[..., None])[:, None, None], in_new, jnp.finfo(f32).min)
        p = jax.nn.softmax(jnp.concatenate([in_prompt, in_made, in_new], axis=-1) * H**-0.5, axis=-1).astype(v_PLKH.dtype)
        y = jnp.einsum("PRKMS,PKSH->PRKMH", p[..., :S], prompt_v)
        y += jnp.einsum("PRKMT,PRKTH->PRKMH", p[..., S : S + T], made_v)
        y += jnp.einsum("PRKMW,PWRKH->PRKMH", p[..., S + T :], new_v)
        return jnp.moveaxis(y.reshape(P, R, K, -1, G, H), 3, 1)

    step_PW, chunk = jnp.broadcast_to(jnp.arange(W), (P, W)), query_chunk and max(1, query_chunk // R)
    return map_chunks(rows, (q_PWRKGH, step_PW), chunk if W > chunk else 0).reshape(q_PLKGH.shape)
