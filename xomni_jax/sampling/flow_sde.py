"""Flow sampling with noise in a window of steps, whose log-probs a policy gradient can use (FlowGRPO 2505.05470, UniGRPO 2603.23500).

The convention is that of `sampling.flow`: sigma runs from 1 to 0, dt = following - sigma < 0. A stochastic step draws
x_next = mean + spread * noise, where with s = level * sqrt(sigma / (1 - sigma)), and sigma = the second noise level in that quotient where
it is 1:

    mean   = x (1 + s^2 / (2 sigma) dt) + velocity (1 + s^2 (1 - sigma) / (2 sigma)) dt
    spread = s sqrt(-dt)

As in FlowGRPO's code a log-prob is the mean over an image's elements, not their sum: the joint density of so many elements would leave no
ratio near 1. Everything is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from xomni_jax.sampling.flow import VelocityFn


class StepSizes(NamedTuple):
    """The scalars of a step from one noise level to the next: float32, or arrays of them.

    Attributes:
      sigma: noise level before the step. dt: the following one minus it.
      s: strength of the noise. spread: standard deviation of what the step adds.
    """

    sigma: jax.Array
    dt: jax.Array
    s: jax.Array

    @property
    def spread(self) -> jax.Array:
        return self.s * jnp.sqrt(-self.dt)

    def mean(self, x: jax.Array, velocity: jax.Array) -> jax.Array:
        """Mean of the next state of x [B, ...] float32, for scalars or with one entry a row."""
        sigma, dt, s = (jnp.reshape(value, (*jnp.shape(value), *[1] * (x.ndim - jnp.ndim(value)))) for value in self)
        drift = s**2 / (2 * sigma)
        return x * (1 + drift * dt) + velocity.astype(jnp.float32) * (1 + drift * (1 - sigma)) * dt


def step_sizes(sigmas: jax.Array | np.ndarray, step: jax.Array | int, level: float) -> StepSizes:
    """The sizes of a step (or of several: an array of numbers) along noise levels [n + 1] from 1 to 0."""
    sigmas = jnp.asarray(sigmas, jnp.float32)
    sigma, following = sigmas[step], sigmas[jnp.asarray(step) + 1]
    quotient = sigma / (1 - jnp.where(sigma == 1, sigmas[1], sigma))
    return StepSizes(sigma, following - sigma, level * jnp.sqrt(quotient))


def step_logp(after: jax.Array, mean: jax.Array, spread: jax.Array) -> jax.Array:
    """Log-density of `after` [B, ...] under a normal step, as the mean over an image's elements: [B]."""
    spread = jnp.reshape(spread, (*jnp.shape(spread), *[1] * (after.ndim - jnp.ndim(spread))))
    density = -((after - mean) ** 2) / (2 * spread**2) - jnp.log(spread) - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.mean(density, axis=tuple(range(1, after.ndim)))


@struct.dataclass
class FlowPath:
    """The stochastic steps of B images, W of them one after the other.

    Attributes:
      step_B: number of the first one, equal for all images of a batch.
      before_BWTC, after_BWTC: latents before and after each step.
      mean_BWTC: the mean of `after` under the model that drew it.
    """

    step_B: jax.Array
    before_BWTC: jax.Array
    after_BWTC: jax.Array
    mean_BWTC: jax.Array


def sde_sample(
    velocity_fn: VelocityFn, noise_BTC: jax.Array, sigmas: np.ndarray, keys_B: jax.Array, first: jax.Array, window: int, level: float
) -> tuple[jax.Array, FlowPath]:
    """Integrates from noise to data like `euler_sample`, but the steps from `first` on, `window` of them, are stochastic.

    Args:
      velocity_fn: (x [B, T, C], sigma_B) -> velocity.
      keys_B: a key per image; its noise does not depend on the rest of the batch.
      first: int32 scalar, so that one program serves every window. window: static; first + window <= n.

    Returns:
      (data [B, T, C] float32, path).
    """
    sigmas, B = jnp.asarray(sigmas, jnp.float32), noise_BTC.shape[0]
    empty = jnp.zeros((window, *noise_BTC.shape), jnp.float32)

    def step(carry, i):
        x, kept = carry
        sizes, inside, place = step_sizes(sigmas, i, level), (i >= first) & (i < first + window), jnp.clip(i - first, 0, window - 1)
        velocity = velocity_fn(x, jnp.full(B, sizes.sigma)).astype(jnp.float32)
        mean = sizes.mean(x, velocity)
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))
        after = jnp.where(inside, mean + sizes.spread * draw(keys_B), x + sizes.dt * velocity)
        put = lambda whole, one: whole.at[place].set(jnp.where(inside, one, whole[place]))  # noqa: E731
        return (after, jax.tree.map(put, kept, (x, after, mean))), None

    (data, kept), _ = jax.lax.scan(step, (noise_BTC.astype(jnp.float32), (empty,) * 3), jnp.arange(len(sigmas) - 1))
    return data, FlowPath(jnp.broadcast_to(jnp.asarray(first, jnp.int32), (B,)), *(jnp.swapaxes(x, 0, 1) for x in kept))
