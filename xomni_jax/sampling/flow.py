"""Flow matching with straight paths (rectified flow): noise schedule, Euler sampler, guidance, training pairs. Pure functions.

x(sigma) = (1 - sigma) data + sigma noise, velocity = noise - data; sigma runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Conditioning(NamedTuple):
    """Conditions of the MMDiT: text [B, S, E], pooled text [B, E], semantics [B, T, C] or None."""

    text_BSE: jax.Array
    pooled_BE: jax.Array
    semantics_BTC: jax.Array | None = None


VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]
ConditionedVelocityFn = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]


def flow_sigmas(
    n_steps: int, n_tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> np.ndarray:
    """Noise levels [n_steps + 1], float32, from 1 to exactly 0; the more tokens, the more of the steps are at high noise.

    linspace(1, 1 / n) is shifted by e^mu / (e^mu + 1 / sigma - 1). mu is linear in the token count through (base_tokens, base_shift) and
    (max_tokens, max_shift), not clamped outside of them; with both shifts 0 the steps are even.
    """
    mu = base_shift + (max_shift - base_shift) * (n_tokens - base_tokens) / (max_tokens - base_tokens)
    sigmas = np.linspace(1.0, 1.0 / n_steps, n_steps)
    shifted = math.exp(mu) / (math.exp(mu) + (1.0 / sigmas - 1.0))
    return np.append(shifted, 0.0).astype(np.float32)


def euler_sample(velocity_fn: VelocityFn, noise: jax.Array, sigmas: jax.Array | np.ndarray) -> jax.Array:
    """Integrates from noise [B, ...] to data along `sigmas` [n + 1]; the state stays float32.

    Args:
      velocity_fn: (x [B, ...], sigma_B) -> velocity [B, ...]. It is traced once, whatever the number of steps.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(x, pair):
        sigma, following = pair
        velocity = velocity_fn(x, jnp.full(x.shape[0], sigma))
        return x + (following - sigma) * velocity.astype(jnp.float32), None

    data, _ = jax.lax.scan(step, noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))
    return data


def euler_sample_reusing(
    evaluate: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]], noise: jax.Array, sigmas: np.ndarray, reuse: int
) -> jax.Array:
    """`euler_sample` whose every `reuse`-th step alone runs the model's blocks; the steps between take over what these gave.

    Args:
      evaluate: (x [B, ...], sigma_B, None or what it kept earlier) -> (velocity [B, ...], what is kept).
    """

    def step(carry, at):
        (x, kept), (sigma, following, fresh) = carry, at
        sigma_B = jnp.full(x.shape[0], sigma)
        velocity, kept = jax.lax.cond(fresh, lambda: evaluate(x, sigma_B, None), lambda: evaluate(x, sigma_B, kept))
        return (x + (following - sigma) * velocity.astype(jnp.float32), kept), None

    x = noise.astype(jnp.float32)
    kept = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda: evaluate(x, jnp.ones(len(x)), None)[1]))
    (data, _), _ = jax.lax.scan(step, (x, kept), (sigmas[:-1], sigmas[1:], np.arange(len(sigmas) - 1) % reuse == 0))
    return data


def null_conditioning(cond: Conditioning, empty_text_SE: jax.Array, empty_pooled_E: jax.Array) -> Conditioning:
    """The negative side of guidance for `cond`: the empty prompt for every sample, and zero semantics."""
    B = cond.text_BSE.shape[0]
    semantics = None if cond.semantics_BTC is None else jnp.zeros_like(cond.semantics_BTC)
    text, pooled = (jnp.broadcast_to(e, (B, *e.shape)) for e in (empty_text_SE, empty_pooled_E))
    return Conditioning(text, pooled, semantics)


def guided_velocity(
    velocity_fn: ConditionedVelocityFn,
    latents_BTC: jax.Array,
    sigma_B: jax.Array,
    cond: Conditioning,
    negative: Conditioning | None,
    scale: float | jax.Array,
) -> jax.Array:
    """Classifier-free guidance, negative + scale * (cond - negative), both sides in one forward of twice the batch.

    `negative=None` (scale 1) is the plain conditional velocity at half the cost.
    """
    if negative is None:
        return velocity_fn(latents_BTC, sigma_B, cond)
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, negative)
    v_BTC = velocity_fn(jnp.concatenate([latents_BTC] * 2), jnp.concatenate([sigma_B] * 2), both)
    cond_BTC, negative_BTC = jnp.split(v_BTC, 2)
    return negative_BTC + scale * (cond_BTC - negative_BTC)


def sample_sigmas(key: jax.Array, n: int, *, distribution: str = "logit_normal", mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Noise levels [n] for training: "logit_normal" = sigmoid(mean + std * normal), or "uniform" in [0, 1)."""
    if distribution == "uniform":
        return jax.random.uniform(key, (n,))
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def flow_training_pair(
    key: jax.Array, latents: jax.Array, *, distribution: str = "logit_normal", mean: float = 0.0, std: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(noisy [B, ...], sigma_B, target velocity [B, ...]) for clean latents [B, ...], all float32. See `sample_sigmas`."""
    noise_key, sigma_key = jax.random.split(key)
    data = latents.astype(jnp.float32)
    noise = jax.random.normal(noise_key, data.shape)
    sigma_B = sample_sigmas(sigma_key, data.shape[0], distribution=distribution, mean=mean, std=std)
    sigma = sigma_B.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - sigma) * data + sigma * noise, sigma_B, noise - data
