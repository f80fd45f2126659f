"""Steps that must not count: a loss or gradient that is not finite, or a gradient far larger than usual, leaves the state as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from xomni_jax.core.config import BelowOne, Natural, NonNegative


@dataclass(frozen=True)
class GuardConfig:
    """Skips steps whose loss or gradient is not finite, or whose gradient is unusually large.

    Attributes:
      limit: so many skipped steps in a row stop the run; 0: no step is skipped, and a loss that is not finite stops the run
      spike: a step is skipped, too, if the norm of its gradient is more than so many times the running mean of the norms; 0: off
      decay: of that running mean, per step that was made
    """

    limit: Natural = 10
    spike: NonNegative = 0.0
    decay: BelowOne = 0.98


def counters(cfg: GuardConfig) -> dict[str, jax.Array]:
    """The counters of a new run: skipped steps, those in a row, and the running mean of the gradient's norm (0: no step yet)."""
    return {"skipped": jnp.int32(0), "in_row": jnp.int32(0), "norm": jnp.float32(0.0)} if cfg.limit else {}


def guarded(update: Callable[..., Any], cfg: GuardConfig) -> Callable[..., Any]:
    """An update that skips bad steps, jitted; unchanged where the guard is off.

    A skipped step leaves everything but the counters as it was, bit for bit. Which it is, is decided on the device, so that the host does
    not wait. Once the limit is reached nothing changes any more, however late the host looks.

    Args:
      update: jitted (TrainState, ...) -> (TrainState, metrics, ...) with metrics `loss/` and `optim/grad_norm`; it may donate the state.
    """
    if not cfg.limit:
        return update

    @functools.wraps(update)
    def step(state: Any, *args: Any) -> tuple[Any, ...]:
        old, before = state.replace(guard={}), state.guard
        new, metrics, *rest = update(old, *args)
        norm, mean = metrics["optim/grad_norm"], before["norm"]
        ok = jnp.isfinite(norm) & (before["in_row"] < cfg.limit)
        for name, value in metrics.items():
            ok &= jnp.isfinite(value) if name.startswith("loss/") else True
        if cfg.spike:
            ok &= (mean == 0) | (norm <= cfg.spike * mean)
        after = {
            "skipped": before["skipped"] + ~ok,
            "in_row": jnp.where(ok, 0, before["in_row"] + 1),
            "norm": jnp.where(ok, jnp.where(mean == 0, norm, cfg.decay * mean + (1 - cfg.decay) * norm), mean),
        }
        chosen = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        shown = {"guard/skipped": after["skipped"], "guard/in_row": after["in_row"]}
        return chosen.replace(guard=after), metrics | shown, *rest

    return jax.jit(step, donate_argnums=0)
