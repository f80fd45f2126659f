"""The codebook of a tokenizer in training: when it starts, which codes are used, and where those that are not start again.

The parameters of the tokenizer lie under "tokenizer" of the state, with its "codebook"; the running usage of codes is in its `extra`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.core.config import BelowOne, Count, Natural, Share
from xomni_jax.models.quantizer import dead_codes, restart_dead_codes, start_codebook
from xomni_jax.training.loop import key_for
from xomni_jax.training.state import TrainState

CODEBOOK_SEED = 2_000_003  # added to the seed of the examples the codebook starts from


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """Schedule of the codebook.

    Attributes:
      warmup_steps: steps on continuous features, before there is a codebook
      ramp_steps: steps over which quantisation grows to its full share after that
      start_batches: batches of other examples, whose encoder outputs the codebook starts from
      restart_every: steps between restarts of dead codes; 0: never
      restart_until: share of the run after which no code is restarted
      usage_decay: decay of the running average of code usage
    """

    warmup_steps: Natural = 200
    ramp_steps: Natural = 100
    start_batches: Count = 8
    restart_every: Natural = 25
    restart_until: Share = 0.7
    usage_decay: BelowOne = 0.98


def even_usage(codes: int) -> dict[str, jax.Array]:
    """The running usage of codes before anything is known."""
    # With its dtype: a weakly typed array would make the second step compile anew.
    return {"usage": jnp.full((codes,), 1.0 / codes, jnp.float32)}


def skipped_images(key: jax.Array, images: int, skip_probability: float, strength: float | jax.Array) -> jax.Array:
    """Bool [images], those that skip quantisation: all at strength 0, a share of `skip_probability` at strength 1, linear between."""
    return jax.random.uniform(key, (images,)) < 1.0 - jnp.asarray(strength, jnp.float32) * (1.0 - skip_probability)


def with_usage(state: TrainState, usage_V: jax.Array, decay: float) -> TrainState:
    """The state with the usage of one more batch in its running average."""
    return state.replace(extra={"usage": decay * state.extra["usage"] + (1 - decay) * usage_V})


def codebook_of(outputs: Iterable[jax.Array], key: jax.Array, codes: int) -> jax.Array:
    """The codebook [V, C] that starts from encoder outputs [B, Y, X, C] of some batches."""
    z_TC = jnp.concatenate([z.reshape(-1, z.shape[-1]) for z in outputs])
    return jax.jit(start_codebook, static_argnums=2)(key, z_TC, codes)


def train_step(
    cfg: Any,
    update: Callable[..., Any],
    first_codebook: Callable[[Any, jax.Array], jax.Array],
    state: TrainState,
    batch: dict[str, jax.Array],
    number: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One update -> (state, metrics). The codebook starts after the warm-up; from then on its dead codes are restarted now and then.

    Args:
      cfg: a `RunConfig` whose section `tokenizer` is a `CodebookConfig`.
      update: (state, batch, key, strength of quantisation) -> (state, metrics, encoder outputs).
      first_codebook: (parameters, key) -> the codebook [V, C] that quantisation starts from.
    """
    c = cfg.tokenizer
    strength = np.clip((number - c.warmup_steps) / max(c.ramp_steps, 1), 0.0, 1.0)
    if number == c.warmup_steps:
        state = with_codebook(state, first_codebook(state.params, key_for(cfg.seed, number, 1)))
    state, metrics, z = update(state, batch, key_for(cfg.seed, number, 0), np.float32(strength))
    due = c.restart_every and number > c.warmup_steps and number % c.restart_every == 0
    if due and number < c.restart_until * cfg.steps:
        key, old = key_for(cfg.seed, number, 2), state.params["tokenizer"]["codebook"]
        codebook, usage, restarted = restart(key, old, state.extra["usage"], z)
        state = with_codebook(state, codebook).replace(extra={"usage": usage})
        metrics = metrics | {"codes/restarted": restarted}
    return state, metrics


@jax.jit
def restart(key: jax.Array, codebook_VC: jax.Array, usage_V: jax.Array, z_BYXC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dead codes start again from encoder outputs, with average usage -> (codebook, usage, number of restarted codes)."""
    codebook_VC, n = restart_dead_codes(key, codebook_VC, usage_V, z_BYXC.reshape(-1, z_BYXC.shape[-1]))
    return codebook_VC, jnp.where(dead_codes(usage_V), 1.0 / usage_V.shape[0], usage_V), n


def with_codebook(state: TrainState, codebook_VC: jax.Array) -> TrainState:
    """The state with another codebook, in the number format and on the devices of the old one. Averages start again where rows change."""
    old, ema, name = state.params["tokenizer"]["codebook"], state.ema, "tokenizer/codebook"
    new = jax.device_put(codebook_VC.astype(old.dtype), old.sharding)
    if name in ema:
        ema = ema | {name: jnp.where(new == old, ema[name], new)}
    return state.replace(params=state.params | {"tokenizer": state.params["tokenizer"] | {"codebook": new}}, ema=ema)
