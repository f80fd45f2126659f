"""The policy gradient on stochastic denoising steps: FlowGRPO (2505.05470) with UniGRPO's changes (2603.23500). Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from xomni_jax.core.config import ConfigError, Count, NonNegative, Positive, check_known
from xomni_jax.sampling.flow_sde import FlowPath, StepSizes, step_logp, step_sizes


@dataclass(frozen=True)
class FlowConfig:
    """Reinforcement learning of the image decoder. The defaults are UniGRPO's where it gives a number that does not depend on the size.

    Attributes:
      window: stochastic denoising steps of an image, one after the other; the others are plain Euler steps, which teach nothing
      within: the window lies within so many first steps; its place is drawn for each batch
      level: a: noise level of stochastic steps (FlowGRPO 0.7, UniGRPO 0.8)
      ratio_norm: divide what the noise of a step amplifies out of its ratio (GRPO-Guard), so that one clip fits all noise levels
      clip: lower and upper clip of the ratio are 1 - clip and 1 + clip (FlowGRPO 1e-4, UniGRPO 1e-6 with ratio_norm)
      advantage_limit: advantages are clamped to so much on either side
      penalty: what keeps the model near the reference: velocity (squared difference of velocities, UniGRPO) or latent (FlowGRPO's KL
        of the steps); both are means over the elements
      penalty_coef: its weight; 0: no reference is kept
    """

    window: Count = 3
    within: Count = 5
    level: Positive = 0.8
    ratio_norm: bool = True
    clip: Positive = 1e-4
    advantage_limit: Positive = 5.0
    penalty: str = "velocity"
    penalty_coef: NonNegative = 0.01

    def __post_init__(self):
        check_known(self, penalty=("velocity", "latent"))
        if self.window > self.within:
            raise ValueError(f"window={self.window} does not fit into within={self.within} steps; lower it")

    def check_steps(self, steps: int) -> None:
        """ConfigError if the decoder makes fewer steps than the window may need."""
        if self.within > steps:
            raise ConfigError(f"config.flow.within={self.within}, but config.decode.steps={steps}; lower it or make more steps")


def normalised_log_ratio(log_ratio_B: jax.Array, shift_B: jax.Array, spread: jax.Array) -> jax.Array:
    """RatioNorm: spread * (log ratio + |shift|^2 / (2 spread^2)), where shift = old mean - new mean.

    With the drawn noise e it equals -shift . e whatever the noise level. `shift_B` is |shift|^2, reduced as the log-ratio is.
    """
    return spread * (log_ratio_B + shift_B / (2 * spread**2))


def flow_loss(
    velocity_BTC: jax.Array,
    reference_BTC: jax.Array | None,
    path: FlowPath,
    offset: jax.Array | int,
    sigmas: jax.Array,
    adv_B: jax.Array,
    ok_B: jax.Array,
    cfg: FlowConfig,
    n_items: jax.Array | int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy gradient of one stochastic step of every image, plus the penalty.

    Args:
      velocity_BTC: of the policy at `path.before` of the step; the only argument that receives a gradient.
      reference_BTC: of the frozen reference there; None without a penalty.
      offset: number of the step inside the window.
      sigmas: noise levels [n + 1].
      adv_B, ok_B: advantages, and which images have one.
      n_items: what sums over images are divided by: the scored images of the whole batch, times the steps.

    Returns:
      The loss, and metrics of this step; see `add_up`.
    """
    before, after, old_mean = (x[:, offset].astype(jnp.float32) for x in (path.before_BWTC, path.after_BWTC, path.mean_BWTC))
    sizes = step_sizes(sigmas, path.step_B + offset, cfg.level)
    mean = sizes.mean(before, velocity_BTC)
    axes = tuple(range(1, before.ndim))
    log_ratio_B = gap_B = step_logp(after, mean, sizes.spread) - step_logp(after, old_mean, sizes.spread)
    if cfg.ratio_norm:
        log_ratio_B = normalised_log_ratio(log_ratio_B, jnp.mean((old_mean - mean) ** 2, axis=axes), sizes.spread)
    policy_B, clipped_B = clipped_loss(log_ratio_B, adv_B, cfg)
    penalty_B = jnp.zeros_like(policy_B)
    if reference_BTC is not None:
        penalty_B = penalty(velocity_BTC, jax.lax.stop_gradient(reference_BTC), sizes, before, cfg)

    def total(x_B):
        return jnp.sum(jnp.where(ok_B, x_B, 0.0)) / n_items

    policy, drift = total(policy_B), total(penalty_B)
    metrics = {
        "flow/policy_loss": policy,
        "flow/penalty": drift,
        "flow/clip_frac": total(clipped_B),
        "flow/ratio_mean": total(jnp.exp(log_ratio_B)),
        "flow/logp_gap_max": jnp.max(jnp.where(ok_B, jnp.abs(gap_B), 0.0)),
    }
    return policy + cfg.penalty_coef * drift, jax.lax.stop_gradient(metrics)


def add_up(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of steps, or of parts of a batch, stacked on the first axis, as those of all: `*_max` by maximum, the others by sum."""
    return {name: (jnp.max if name.endswith("_max") else jnp.sum)(values, axis=0) for name, values in stacked.items()}


def clipped_loss(log_ratio_B: jax.Array, adv_B: jax.Array, cfg: FlowConfig) -> tuple[jax.Array, jax.Array]:
    """max(-A ratio, -A clip(ratio)) with clamped advantages, and where the clip cuts the gradient."""
    adv_B = jnp.clip(jax.lax.stop_gradient(adv_B), -cfg.advantage_limit, cfg.advantage_limit)
    ratio_B = jnp.exp(log_ratio_B)
    loss_B = jnp.maximum(-adv_B * ratio_B, -adv_B * jnp.clip(ratio_B, 1 - cfg.clip, 1 + cfg.clip))
    return loss_B, ((adv_B > 0) & (ratio_B > 1 + cfg.clip)) | ((adv_B < 0) & (ratio_B < 1 - cfg.clip))


def penalty(velocity: jax.Array, reference: jax.Array, sizes: StepSizes, before: jax.Array, cfg: FlowConfig) -> jax.Array:
    """How far the policy is from the reference in one step, [B]: see `FlowConfig.penalty`.

    FlowGRPO's code leaves the factor 1 / |dt| of the exact divergence of the two steps out, and so does this.
    """
    axes = tuple(range(1, before.ndim))
    if cfg.penalty == "velocity":
        return jnp.mean((velocity.astype(jnp.float32) - reference) ** 2, axis=axes)
    shift = sizes.mean(before, velocity) - sizes.mean(before, reference)
    return jnp.mean(shift**2, axis=axes) / (2 * sizes.s**2)
