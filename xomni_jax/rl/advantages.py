"""Group-relative advantages: rewards of one prompt's rollouts compared with one another.

P prompts, R rollouts per prompt. Advantages need whole groups: gather the rewards, compute, then slice per device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from msgspec import Meta

from xomni_jax.core.config import Positive, check_known
from xomni_jax.rewards.combine import deviations


@dataclass(frozen=True)
class AdvantageConfig:
    """A_i = (r_i - baseline) / (std + eps). The defaults are those of TRL, CoRL and Janus-Pro-R1.

    Tunix: eps=1e-6; its `rloo` is baseline="rloo", scale="none"; its `drgrpo` is scale="none".
    FlowGRPO: ddof=0, clip=5.0, and scale="batch" for its global standard deviation.

    Attributes:
      ddof: 1 for the sample standard deviation, 0 for the population one. They differ visibly for groups of 2 to 4.
      eps: added to the standard deviation, so that equal rewards do not divide zero by zero. A reward spread below about 10 eps is damped.
      scale: where the standard deviation is taken: over the "group", over the "batch" of raw rewards, or "none" (centred only).
      baseline: what is subtracted: the group's "mean", or "rloo", the mean of the others.
      clip: advantages are clamped to [-clip, clip]; None for no clamp.
    """

    ddof: Annotated[int, Meta(ge=0, le=1)] = 1
    eps: Positive = 1e-4
    scale: str = "group"
    baseline: str = "mean"
    clip: Positive | None = None

    def __post_init__(self):
        check_known(self, scale=("group", "batch", "none"), baseline=("mean", "rloo"))


def flat_groups(reward_PR: Any, ok_PR: Any) -> Any:
    """Which groups [P, 1] teach nothing: equal rewards, or fewer than two known ones. In numpy or in JAX."""
    xp = reward_PR.__array_namespace__()
    low_P1 = xp.min(xp.where(ok_PR, reward_PR, xp.inf), axis=-1, keepdims=True)
    high_P1 = xp.max(xp.where(ok_PR, reward_PR, -xp.inf), axis=-1, keepdims=True)
    # Equal rewards, not a zero deviation: the float mean of equal numbers may differ from them by an ulp.
    return (xp.sum(ok_PR, axis=-1, keepdims=True) < 2) | (low_P1 == high_P1)


def group_advantages(
    reward_PR: jax.Array, ok_PR: jax.Array, cfg: AdvantageConfig = AdvantageConfig()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Advantages of rollouts relative to their prompt's group. [P, R], [P, R] bool -> [P, R], metrics.

    A rollout that is not `ok` (its reward is unknown), or whose reward is NaN, takes no part in any mean or deviation and gets 0;
    so does a rollout that is alone in its group. Several rewards are first made one, see `rewards.combine`.

    Metrics: `grpo/flat_group_frac`, the share of groups without any signal (equal rewards, or fewer than two known ones);
    `grpo/unscored_frac`, the share of rollouts that took no part.
    """
    reward_PR = jnp.asarray(reward_PR)
    reward_PR = reward_PR.astype(jnp.promote_types(reward_PR.dtype, jnp.float32))
    ok_PR = jnp.asarray(ok_PR, bool) & jnp.isfinite(reward_PR)
    flat_P1 = flat_groups(reward_PR, ok_PR)
    adv_PR, std, n_P1 = deviations(reward_PR, ok_PR & ~flat_P1, -1, cfg.ddof)
    if cfg.baseline == "rloo":
        # r - (sum - r) / (n - 1)  =  (r - mean) n / (n - 1)
        adv_PR = adv_PR * n_P1 / jnp.maximum(n_P1 - 1, 1)
    if cfg.scale == "batch":
        _, std, _ = deviations(reward_PR, ok_PR, None, cfg.ddof)
    if cfg.scale != "none":
        adv_PR = adv_PR / (std + cfg.eps)
    if cfg.clip is not None:
        adv_PR = jnp.clip(adv_PR, -cfg.clip, cfg.clip)

    dtype = jnp.result_type(float)
    metrics = {"grpo/flat_group_frac": jnp.mean(flat_P1, dtype=dtype), "grpo/unscored_frac": jnp.mean(~ok_PR, dtype=dtype)}
    return jax.lax.stop_gradient(adv_PR), metrics
