"""From logits to a sampled token: guidance, temperature, top-k, top-p, min-p, in the order of the released sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from xomni_jax.models.vocab_heads import token_logp

COLDEST = 1e-6  # below, float32 logits divided by the temperature may overflow; the likeliest token is certain long before
STRONGEST = 1e4  # guidance beyond it overflows likewise


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is sampled. The defaults are those of the released image sampler, its implicit top_k=50 included.

    Attributes:
      temperature: logits are divided by it; 0 is greedy
      top_k: keep the k largest logits and those equal to the k-th; 0 is off
      top_p: keep the smallest set of most probable tokens whose total probability reaches it; 1 is off
      min_p: keep tokens of at least min_p times the largest probability; 0 is off
      guidance: weight w of neg + w * (cond - neg) on log-probabilities; 1 is off
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.03
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling temperature={self.temperature} is not a number >= 0; use 1.0, or 0 for greedy")
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"sampling temperature={self.temperature} is too small to divide logits by; use 0 for greedy")
        if not (self.top_k >= 0 and float(self.top_k).is_integer()):
            raise ValueError(f"sampling top_k={self.top_k} is not a count; use a whole number, or 0 to turn it off")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling top_p={self.top_p} is outside (0, 1]; use 1 to turn it off")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling min_p={self.min_p} is outside [0, 1]; use 0 to turn it off")
        if not 0 <= self.guidance <= STRONGEST:
            raise ValueError(f"sampling guidance={self.guidance} is not a number from 0 to {STRONGEST:g}; use 1 to turn it off")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be sampled, so that log-probabilities need the sampling mask."""
        return self.greedy or self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is needed."""
        return self.guidance != 1.0


@struct.dataclass
class TracedSampling:
    """A `SamplingConfig` as arrays: one program samples with any values of it, where requests bring their own.

    Attributes:
      temperature, top_k, top_p, min_p, guidance: scalars, as in `SamplingConfig`.
      guided, nucleus: static, whether there are negative prompts, and whether top_p may be below 1, which costs a sort of its own.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    guidance: jax.Array
    guided: bool = struct.field(pytree_node=False, default=False)
    nucleus: bool = struct.field(pytree_node=False, default=True)

    @property
    def truncates(self) -> bool:
        """True: whether it does is known only when it runs."""
        return True

    @classmethod
    def of(cls, config: SamplingConfig) -> Self:
        """The values of a configuration, on the host."""
        numbers = (config.temperature, config.top_p, config.min_p, config.guidance)
        temperature, top_p, min_p, guidance = (np.float32(x) for x in numbers)
        return cls(temperature, np.int32(min(config.top_k, 2**31 - 1)), top_p, min_p, guidance, config.guided, config.top_p < 1)

    def tempered(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scores / temperature, `sampling_mask`): guided scores [..., V] -> float32 and bool [..., V]."""
        V, greedy = scores.shape[-1], self.temperature == 0
        z = scores.astype(jnp.float32) / jnp.where(greedy, 1.0, self.temperature)
        k = jnp.where(self.top_k > 0, jnp.minimum(self.top_k, V), V)
        least = jnp.take_along_axis(jnp.sort(z, axis=-1), jnp.broadcast_to(V - k, (*z.shape[:-1], 1)), axis=-1)
        mask = z >= least
        if self.nucleus:
            order = jnp.argsort(z, axis=-1, stable=True)
            ranked = jnp.take_along_axis(jnp.where(mask, z, -jnp.inf), order, axis=-1)
            total = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
            keep = ((total > 1 - self.top_p) | (self.top_p >= 1)).at[..., -1].set(True)
            mask &= jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
        p = jax.nn.softmax(jnp.where(mask, z, -jnp.inf), axis=-1)
        mask &= p >= self.min_p * jnp.max(p, axis=-1, keepdims=True)
        return z, jnp.where(greedy, jax.nn.one_hot(jnp.argmax(scores, axis=-1), V, dtype=bool), mask)


# Greedy text decoding, as the released chat does.
GREEDY = SamplingConfig(temperature=0.0, top_k=0, min_p=0.0)


def guide(cond: jax.Array, neg: jax.Array | None, guidance: float | jax.Array) -> jax.Array:
    """Guided scores neg + w * (cond - neg) over log-softmax, float32 [..., V]; the logits themselves when w is 1."""
    cond = cond.astype(jnp.float32)
    if neg is None or (isinstance(guidance, float) and guidance == 1.0):
        return cond
    cond, neg = jax.nn.log_softmax(cond, axis=-1), jax.nn.log_softmax(neg.astype(jnp.float32), axis=-1)
    return neg + guidance * (cond - neg)


def temper(scores: jax.Array, temperature: float) -> jax.Array:
    """scores / temperature in float32. A temperature of 0 (greedy) leaves the scores: there the mask alone decides."""
    return scores.astype(jnp.float32) / (temperature or 1.0)


def sampling_mask(scores: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Tokens that may be sampled: guided scores [..., V] before the temperature -> bool [..., V] with no empty row.

    Ties are treated as in transformers' logits warpers: top-k and min-p never separate equal tokens; top-p may, and then keeps the
    later ids (torch's sort is not stable and leaves the choice open).
    """
    if sampling.greedy:
        return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=bool)
    z = temper(scores, sampling.temperature)
    mask = jnp.ones(z.shape, bool)
    if sampling.top_k:
        mask &= z >= jax.lax.top_k(z, min(int(sampling.top_k), z.shape[-1]))[0][..., -1:]
    if sampling.top_p < 1:
        left = jnp.where(mask, z, -jnp.inf)
        order = jnp.argsort(left, axis=-1, stable=True)
        total = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(left, order, axis=-1), axis=-1), axis=-1)
        keep_sorted = (total > 1 - sampling.top_p).at[..., -1].set(True)
        mask &= jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    if sampling.min_p:
        p = jax.nn.softmax(jnp.where(mask, z, -jnp.inf), axis=-1)
        mask &= p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True)
    return mask


def draw(scores: jax.Array, keys: jax.Array, sampling: SamplingConfig | TracedSampling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples one token per row.

    Args:
      scores: guided scores [P, R, V]. keys: one PRNG key per row, [P, R].

    Returns:
      Tokens int32 [P, R], their log-probability [P, R] under the truncated distribution, the sampling mask [P, R, V].
    """
    if isinstance(sampling, TracedSampling):
        z, mask = sampling.tempered(scores)
    else:
        z, mask = temper(scores, sampling.temperature), sampling_mask(scores, sampling)
    pick = jax.vmap(jax.vmap(jax.random.categorical))
    tokens = pick(keys, jnp.where(mask, z, -jnp.inf)).astype(jnp.int32)
    return tokens, token_logp(z, tokens, mask if sampling.truncates else None)[0], mask
