"""Weights of the loss that follow what a run measures: the entropy bonus, and both it and the KL term while held-out signals fall.

All of it is part of the update's program and of the saved state, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from msgspec import Meta

from xomni_jax.core.config import BelowOne, ConfigError, Count, NonNegative, PositiveShare, Share


@dataclass(frozen=True)
class EntropyConfig:
    """Entropy bonus, with a target if it has one (arXiv 2603.23086, whose code has coef=2.2e-3, target=0.78 and the other defaults).

    Attributes:
      coef: weight of the entropy of a code, in nats; 0: no bonus
      target: entropy to be kept, as a share of the logarithm of the number of codes; None: the weight is always coef
      band: distance from the target within which the weight is left alone
      gain: outside of it the weight is multiplied by exp(gain x (target - entropy))
      smallest: lower bound of the weight with a target
      largest: upper bound of the weight with a target
      warmup: first share of the run, in which the weight rises linearly from 0
      flat_until: share of the run after which it falls to 0 along a cosine
    """

    coef: NonNegative = 0.0
    target: Share | None = None
    band: NonNegative = 0.015
    gain: NonNegative = 3.0
    smallest: NonNegative = 7e-5
    largest: NonNegative = 4e-3
    warmup: BelowOne = 0.05
    flat_until: PositiveShare = 0.85

    def __post_init__(self):
        if self.smallest > self.largest:
            raise ValueError(f"smallest={self.smallest:g} is above largest={self.largest:g}")
        if self.target is not None and not self.coef:
            raise ValueError(f"target={self.target:g} steers the weight coef, which is 0; set it, such as to 2.2e-3")


@dataclass(frozen=True)
class RestraintConfig:
    """Multiplies the weights of the KL term and of the entropy bonus while signals that are not rewarded fall.

    The running mean of every signal is compared with its mean over the first steps, less one standard error of their difference, which the
    choice of prompts alone may make. The factor is largest ** fall, where fall is the worst of them as a share of what each may lose, 0 to
    1: it depends on where the signals are alone, so that nothing winds up and swings.

    Attributes:
      signals: metrics with the share of its first value that each may lose, such as ('image/colour_entropy', 0.03), or
        ('reward/judge/mean', 0.05) of a judge of weight 0; (): off
      settle: first steps, whose mean the signals are compared with
      decay: of the running mean and variance of a signal
      largest: factor where a signal has lost all that it may
    """

    signals: tuple[tuple[str, PositiveShare], ...] = ()
    settle: Count = 10
    decay: BelowOne = 0.9
    largest: Annotated[float, Meta(ge=1, le=1e9)] = 100.0


class LossWeights(NamedTuple):
    """Weights of one update: of the KL term, and of the entropy bonus."""

    kl: jax.Array | float
    entropy: jax.Array | float = 0.0


def entropy_coef(cfg: EntropyConfig, progress: jax.Array | float, entropy: jax.Array | float) -> jax.Array:
    """Weight of the entropy bonus with a target.

    Args:
      progress: share of the run that is done. entropy: that of the policy as a share of the logarithm of the number of codes.
    """
    tail = (progress - cfg.flat_until) / max(1 - cfg.flat_until, 1e-9)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(tail, 0.0, 1.0)))
    shape = jnp.where(progress < cfg.warmup, progress / max(cfg.warmup, 1e-9), cosine)
    error = cfg.target - entropy
    return jnp.clip(cfg.coef * shape * jnp.where(jnp.abs(error) > cfg.band, jnp.exp(cfg.gain * error), 1.0), cfg.smallest, cfg.largest)


def restrained(cfg: RestraintConfig, state: Mapping[str, jax.Array], signal_S: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """The state after a step whose signals were these (NaN: not measured), and the worst fall as a share of what its signal may lose."""
    known_S, settling_S = jnp.isfinite(signal_S), state["seen"] < cfg.settle
    seen_S = state["seen"] + known_S
    surprise_S = jnp.where(known_S, signal_S - state["mean"], 0.0)
    # While it settles, plain moments of what was seen (Welford); then running ones.
    share_S = jnp.where(settling_S, 1.0 / jnp.maximum(seen_S, 1), 1.0 - cfg.decay)
    mean_S = state["mean"] + share_S * surprise_S
    variance_S = jnp.where(known_S, (1.0 - share_S) * (state["variance"] + share_S * surprise_S**2), state["variance"])
    first_S = jnp.where(settling_S, mean_S, state["first"])
    error_S = jnp.sqrt(variance_S * (1.0 / cfg.settle + (1.0 - cfg.decay) / (1.0 + cfg.decay)))
    allowed_S = jnp.array([share for _, share in cfg.signals]) * jnp.maximum(jnp.abs(first_S), 1e-9)
    fall = jnp.max(jnp.where(settling_S, 0.0, (first_S - mean_S - error_S) / allowed_S))
    return {"seen": seen_S, "first": first_S, "mean": mean_S, "variance": variance_S}, fall


@dataclass(frozen=True)
class Control:
    """The weights of a run's updates.

    Attributes:
      entropy, restraint: how they follow what is measured.
      kl_coef: of the objective.
      updates: optimizer updates of the run.
      codes: among which a code is drawn.
    """

    entropy: EntropyConfig
    restraint: RestraintConfig
    kl_coef: float
    updates: int
    codes: int

    @property
    def off(self) -> bool:
        """Whether the weights are those of the objective, always."""
        return not (self.entropy.coef or self.restraint.signals)

    def initial(self) -> dict[str, Any]:
        """Arrays of the training state at the start of a run."""
        state, S = dict[str, Any](), len(self.restraint.signals)
        if self.entropy.target is not None:
            # Of float32 as after an update, not of a number's weak type, for which the update would be compiled again.
            state["entropy_coef"] = jnp.asarray(entropy_coef(self.entropy, 0.0, self.entropy.target), jnp.float32)
        if S:
            zeros = jnp.zeros(S)
            state["restraint"] = {"seen": jnp.zeros(S, jnp.int32), "first": zeros, "mean": zeros, "variance": zeros}
        return state

    def before(
        self, state: Mapping[str, Any], signal_S: jax.Array | None
    ) -> tuple[dict[str, Any], LossWeights | None, dict[str, jax.Array]]:
        """(state, weights, metrics) of an update, from the signals of its rollouts; no weights where they are the objective's own."""
        if self.off:
            return dict(state), None, {}
        weights = LossWeights(jnp.float32(self.kl_coef), jnp.asarray(state.get("entropy_coef", self.entropy.coef), jnp.float32))
        metrics = dict[str, jax.Array]()
        if signal_S is not None:
            restraint, fall = restrained(self.restraint, state["restraint"], signal_S)
            state, metrics = {**state, "restraint": restraint}, {"control/fall": fall}
            weights = LossWeights(*(self.restraint.largest ** jnp.clip(fall, 0.0, 1.0) * weight for weight in weights))
        return dict(state), weights, metrics | {"control/kl_coef": weights.kl, "control/entropy_coef": weights.entropy}

    def after(self, state: Mapping[str, Any], step: jax.Array, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The state after `step` updates, the last of which gave these metrics: the weight follows the entropy of the update before."""
        if self.entropy.target is None:
            return dict(state)
        share = metrics["grpo/entropy"] / math.log(self.codes)
        return {**state, "entropy_coef": entropy_coef(self.entropy, step / self.updates, share)}


def check_control(cfg: RestraintConfig, multiplied: float, rewards: Iterable[str]) -> None:
    """ConfigError if a signal is not measured, or there is nothing to multiply.

    Args:
      multiplied: weight of the KL term or of the entropy bonus. rewards: names of those that are asked.
    """
    measured = ["image/colour_entropy", "image/edge_density", *(f"reward/{name}/{what}" for name in rewards for what in ("mean", "std"))]
    for name, _ in cfg.signals:
        if name not in measured:
            raise ConfigError(f"config.restraint.signals: {name} is not measured in this run; name one of {', '.join(measured)}")
    if cfg.signals and not multiplied:
        raise ConfigError("config.restraint multiplies config.grpo.kl_coef and config.entropy.coef, which are both 0; set one of them")
