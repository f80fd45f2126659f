"""Sampling written the plain way, to compare with."""

import jax
import jax.numpy as jnp

from xomni_jax.sampling.logits import temper


def masked_logp(scores, mask, temperature=1.0):
    """Log-probabilities [..., V] of the truncated, renormalised distribution; -inf outside `mask` (None keeps all tokens)."""
    z = temper(scores, temperature)
    return jax.nn.log_softmax(z if mask is None else jnp.where(mask, z, -jnp.inf), axis=-1)
