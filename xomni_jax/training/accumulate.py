"""Gradient accumulation: a batch in micro-batches whose losses and gradients add up to those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split_rows(rows: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...] for every array, dealt out in turn: a batch axis split over a mesh stays where it is."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def join_rows(rows: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)


def summed(stacked: Any) -> Any:
    """Metrics of micro-batches, stacked on the first axis, as those of the batch, where each is divided by counts of the whole batch."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)


def gradient(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    params: Any,
    rows: Any,
    parts: int = 1,
    join: Callable[[Any], Any] = summed,
    ready: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, Any, jax.Array]:
    """(gradient, what the loss returns beside its value, its value) over `parts` micro-batches, one after the other.

    Args:
      loss: (ready(params), rows) -> (value, aux). The values of micro-batches must add up to that of the batch: it divides by the
        counts of the whole batch, not by those of the rows that it is given.
      rows: tree of arrays [B, ...].
      join: aux of all micro-batches, stacked on the first axis -> that of the batch.
      ready: what is computed once for all micro-batches.
    """
    if parts == 1:
        (value, aux), grads = jax.value_and_grad(lambda p: loss(ready(p), rows), has_aux=True)(params)
        return grads, aux, value
    made, back = jax.vjp(ready, params)

    def accumulate(carry, part):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(made, part)
        return (jax.tree.map(jnp.add, carry[0], back(grads)[0]), carry[1] + value), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, value), stacked = jax.lax.scan(accumulate, (zeros, jnp.float32(0.0)), split_rows(rows, parts))
    return grads, join(stacked), value
