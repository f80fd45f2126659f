"""The GRPO objective on log-probs: ratio, clip, KL to the reference, reduction. X-Omni equation 1 and its relatives.

Everything here is a pure function of arrays [B, L]: B rollouts, L positions, of which the mask selects the sampled tokens.
For an X-Omni image these are exactly the height x width codes after `<IMAGE>`; the prefix is given and `<EOM>` is appended.

The expected gradient is exactly that of the expected reward, up to a constant factor, with advantages that are only centred
(`AdvantageConfig(scale="none")`) and one update per batch, for every ratio, reduction and clip where all rollouts have one length; with
rollouts of several lengths for the ratio trajectory and for reductions whose weights are sum or scale over rows or filled rows. With
several updates per batch only the ratio trajectory without a clip is exact. Rollouts without a score keep this: the reward is then that
of a rollout given that it is scored. configs/methods/README.md has the bias of the others (tests/rl/exact_gradients.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from msgspec import Meta

from xomni_jax.core.config import Count, NonNegative, Positive, PositiveShare, check_known
from xomni_jax.rl.control import LossWeights

# Reduction -> (weight of a token inside its rollout, what the sum over rollouts is divided by).
#   mean  1 / (number of tokens of the rollout)     rows    rollouts, fully masked ones included
#   sum   1                                         filled  rollouts with at least one token
#   scale 1 / max_length                            tokens  tokens
# The first five are TRL's names, the others Tunix's. With `n_items` of a whole accumulation window given, `bnpo` is `dapo`:
# its dependence on the micro-batch is a side effect we do not reproduce.
REDUCTIONS = {
    "grpo": ("mean", "rows"),
    "bnpo": ("sum", "tokens"),
    "dr_grpo": ("scale", "rows"),
    "dapo": ("sum", "tokens"),
    "cispo": ("sum", "tokens"),
    "token-mean": ("sum", "tokens"),
    "sequence-mean-token-mean": ("mean", "filled"),
    "sequence-mean-token-scale": ("scale", "filled"),
    "seq-mean-token-sum": ("sum", "filled"),
    "sequence-mean-token-sum-norm": ("sum", "rows"),
}


@dataclass(frozen=True)
class GRPOConfig:
    """One GRPO update. The defaults are the X-Omni paper's where it gives a number, otherwise the common choice.

    Attributes:
      rollouts_per_prompt: G: completions drawn per prompt; their rewards are compared with one another
      updates_per_batch: mu (DeepSeekMath, algorithm 1): optimizer updates per batch of rollouts; 1 is on-policy
      clip_low: eps, eps_low: lower clip of the ratio is 1 - clip_low
      clip_high: eps, eps_high: upper clip of the ratio is 1 + clip_high (DAPO: 0.28)
      kl_coef: beta: weight of D_KL(pi || pi_ref) (X-Omni: 0.01)
      kl_estimator: k1, k2 or k3 of Schulman's note, at the sampled token; k1 only as a metric, or with kl_importance
      kl_importance: multiply the KL term by the ratio: with k1 or k3 its gradient is that of the reverse KL, of whole trajectories with
        the ratio trajectory, of each token at the prefix that was drawn with the ratio token
      ratio: rho: per token; sequence (GSPO: exp of the mean log-ratio); or trajectory (equation 1 literally)
      reduction: from token losses to one number: a key of REDUCTIONS
      delta: caps the unclipped ratio, so that a negative advantage with a large ratio is bounded (Tunix: epsilon_c); None: no cap
      ratio_cap: eps_max of CISPO: cap of the detached ratio; read by reduction cispo only
      importance_cap: C: where the sampler's log-probs are not the policy's, a token's policy term is weighted by
        min(pi_old / pi_sampler, C), truncated importance sampling; 0: by 1
      max_length: |o|_max: the constant divisor of dr_grpo and sequence-mean-token-scale
      log_ratio_cap: exp of a log-ratio, to pi_old or to pi_ref, goes on as a straight line above this, so that it stays finite
    """

    rollouts_per_prompt: Annotated[int, Meta(ge=2, le=2**31 - 1)] = 16
    updates_per_batch: Count = 1
    clip_low: PositiveShare = 0.2
    clip_high: Positive = 0.2
    kl_coef: NonNegative = 0.01
    kl_estimator: str = "k3"
    kl_importance: bool = False
    ratio: str = "token"
    reduction: str = "grpo"
    delta: Positive | None = None
    ratio_cap: Positive = 5.0
    importance_cap: NonNegative = 0.0
    max_length: Count | None = None
    log_ratio_cap: Annotated[float, Meta(gt=0, le=80)] = 20.0

    def __post_init__(self):
        check_known(self, kl_estimator=("k1", "k2", "k3"), ratio=("token", "sequence", "trajectory"), reduction=tuple(REDUCTIONS))
        if self.kl_estimator == "k1" and self.kl_coef > 0 and not self.kl_importance:
            raise ValueError(
                "kl_estimator='k1' in the loss has zero expected gradient, so it would regularise nothing; "
                "use 'k3' or 'k2', set kl_importance=True, or set kl_coef=0 to keep k1 as a metric"
            )
        if self.ratio == "trajectory" and self.reduction != "grpo":
            raise ValueError(
                f"ratio='trajectory' has one loss per rollout and is averaged over rollouts; reduction={self.reduction!r} "
                "does not apply, use 'grpo'"
            )
        if self.importance_cap and self.ratio != "token":
            raise ValueError(
                f"importance_cap={self.importance_cap:g} weighs tokens; ratio={self.ratio!r} has one weight per rollout, use 'token'"
            )
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(f"delta={self.delta} must lie above 1 + clip_high = {1 + self.clip_high:g}, or be None")
        if self.max_length is None and REDUCTIONS[self.reduction][0] == "scale":
            raise ValueError(f"reduction={self.reduction!r} divides by max_length; set it to the longest completion")


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, estimator: str = "k3", cap: float = 20.0) -> jax.Array:
    """Estimate of KL(pi || pi_ref) at sampled tokens, elementwise.

    As a loss term on-policy: E[grad k1] = 0, E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi), each of a token at the
    prefix that was drawn: what a token does to the divergence of those after it has no part in them.
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    # expm1 is exact near 0, where almost all of d lies; above the cap this is `bounded_exp`.
    return jnp.expm1(jnp.minimum(d, cap)) + jnp.exp(cap) * jnp.maximum(d - cap, 0.0) - d


def bounded_exp(x: jax.Array, cap: float) -> jax.Array:
    """exp(x) up to `cap`, above it the tangent there: a clamp would have no gradient that brings x back."""
    return jnp.exp(jnp.minimum(x, cap)) * (1.0 + jnp.maximum(x - cap, 0.0))


def loss_items(mask_BL: jax.Array, cfg: GRPOConfig) -> jax.Array:
    """What the loss of a batch is divided by: rollouts or tokens, as the reduction wants. [B, L] -> scalar.

    Under gradient accumulation call it on the mask of the whole window and hand the result to every micro-batch's `grpo_loss`:
    the micro-batch losses and gradients then *add up* to those of the whole batch, whatever the split.
    """
    mask_BL = jnp.asarray(mask_BL, bool)
    over = REDUCTIONS[cfg.reduction][1]
    if over == "rows":
        return jnp.asarray(mask_BL.shape[0])
    return jnp.maximum(jnp.sum(jnp.any(mask_BL, -1) if over == "filled" else mask_BL), 1)


def importance(
    old_logp_BL: jax.Array, sampler_logp_BL: jax.Array, mask_BL: jax.Array, cap: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weights min(pi_old / pi_sampler, cap) of sampled tokens [B, L], 1 where masked, and how far the two distributions are apart.

    The metrics: `grpo/sampler_kl`, the k3 estimate of KL(sampler || policy) per token; `grpo/importance_mean`; and
    `grpo/importance_cut_frac`, the share of the tokens whose weight the cap cuts.
    """
    d_BL = jax.lax.stop_gradient(jnp.where(mask_BL, old_logp_BL - sampler_logp_BL, 0.0))
    weight_BL = jnp.exp(jnp.minimum(d_BL, jnp.log(cap)))
    return jnp.where(mask_BL, weight_BL, 1.0), {
        "grpo/sampler_kl": _masked_mean(kl_estimate(0.0, d_BL), mask_BL),
        "grpo/importance_mean": _masked_mean(weight_BL, mask_BL),
        "grpo/importance_cut_frac": _masked_mean(d_BL > jnp.log(cap), mask_BL),
    }


def grpo_loss(
    logp_BL: jax.Array,
    old_logp_BL: jax.Array | None,
    ref_logp_BL: jax.Array | None,
    adv: jax.Array,
    mask_BL: jax.Array,
    cfg: GRPOConfig,
    n_items: jax.Array | int | None = None,
    entropy_BL: jax.Array | None = None,
    weights: LossWeights | None = None,
    importance_BL: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy gradient plus kl_coef times the KL to the reference, less an entropy bonus, reduced over the masked tokens.

    Args:
      logp_BL: log-probs of the sampled tokens under the policy; the only argument that receives a gradient.
      old_logp_BL: under the policy that drew the rollouts; None if this is it (one update per batch): ratio 1.
      ref_logp_BL: under the frozen reference; None without a KL term (kl_coef 0).
      adv: advantage of each rollout [B], or of each token [B, L] where segments are credited apart; 0 where the reward is unknown.
      mask_BL: true where a token was sampled. What stands elsewhere, even inf or NaN, has no influence.
      n_items: the divisor of a whole accumulation window, from `loss_items`; None: this batch is the window.
      entropy_BL: the policy's entropy at each position, for the metrics, and for a bonus where `weights` has one.
      weights: of the KL term and of the entropy bonus in this update; None: cfg.kl_coef, and no bonus.
      importance_BL: weights of the tokens' policy terms, from `importance`; None: 1.

    Returns:
      The loss, and metrics `grpo/{policy_loss, ratio_mean, ratio_max, clip_frac, logp_gap_max}`, with a reference also
      `grpo/{kl, kl_max}`, with an entropy `grpo/entropy`. Join those of micro-batches with `join_metrics`.
    """
    dtype = jnp.promote_types(logp_BL.dtype, jnp.float32)
    mask_BL = jnp.asarray(mask_BL, bool)

    def known(x_BL):
        return jnp.where(mask_BL, jnp.asarray(x_BL).astype(dtype), 0.0)

    per_token = jnp.ndim(adv) == 2
    if per_token and cfg.ratio == "trajectory":
        raise ValueError("ratio='trajectory' has one clipped term per rollout, so it takes one advantage per rollout [B], not [B, L]")
    adv = jax.lax.stop_gradient(known(adv) if per_token else jnp.asarray(adv).astype(dtype)[:, None])
    logp_BL = known(logp_BL)
    old_BL = jax.lax.stop_gradient(logp_BL if old_logp_BL is None else known(old_logp_BL))
    tokens_B1 = jnp.sum(mask_BL, -1, keepdims=True)
    log_ratio_BL = logp_BL - old_BL
    ratio, live = _ratio(log_ratio_BL, mask_BL, tokens_B1, cfg)
    if per_token:
        ratio, live = jnp.broadcast_to(ratio, mask_BL.shape), mask_BL
    policy, clipped = _policy_loss(ratio, logp_BL, adv, cfg)
    policy = policy if importance_BL is None else policy * importance_BL

    metrics = _ratio_metrics(ratio, live, clipped, log_ratio_BL)
    kl_BL = jnp.zeros_like(logp_BL)
    if ref_logp_BL is not None:
        kl_BL = kl_estimate(logp_BL, jax.lax.stop_gradient(known(ref_logp_BL)), cfg.kl_estimator, cfg.log_ratio_cap)
        metrics |= {"grpo/kl": _masked_mean(kl_BL, mask_BL), "grpo/kl_max": jnp.max(jnp.where(mask_BL, kl_BL, 0.0))}
    if entropy_BL is not None:
        metrics["grpo/entropy"] = _masked_mean(known(entropy_BL), mask_BL)

    penalty_BL = (cfg.kl_coef if weights is None else weights.kl) * (ratio * kl_BL if cfg.kl_importance else kl_BL)
    if weights is not None:
        penalty_BL -= weights.entropy * known(entropy_BL)
    n = loss_items(mask_BL, cfg) if n_items is None else n_items
    inside = {"mean": 1 / jnp.maximum(tokens_B1[:, 0], 1), "sum": 1.0, "scale": 1 / (cfg.max_length or 1)}
    # Equation 1 as printed has one clipped term per rollout, and the KL of a trajectory is the sum over its tokens.
    weight_B = 1.0 if cfg.ratio == "trajectory" else inside[REDUCTIONS[cfg.reduction][0]]

    def reduced(x, counts):
        return jnp.sum(weight_B * jnp.sum(jnp.where(counts, x, 0.0), -1)) / n

    metrics["grpo/policy_loss"] = reduced(policy, live if cfg.ratio == "trajectory" else mask_BL)
    return metrics["grpo/policy_loss"] + reduced(penalty_BL, mask_BL), jax.lax.stop_gradient(metrics)


def join_metrics(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of micro-batches, stacked on the first axis, as those of the window: `*_max` by maximum, `*loss` by sum, else mean.

    The mean is exact when the micro-batches hold equally many tokens, as rollouts of one image size do.
    """

    def rule(name):
        return jnp.max if name.endswith("_max") else jnp.sum if name.endswith("loss") else jnp.mean

    return {name: rule(name)(values, axis=0) for name, values in stacked.items()}


def _ratio(log_ratio_BL, mask_BL, tokens_B1, cfg):
    """rho and where it counts: [B, L] per token, [B, 1] per rollout. Masked log-ratios are 0 already."""
    if cfg.ratio == "token":
        log_ratio, live = log_ratio_BL, mask_BL
    else:
        log_ratio, live = jnp.sum(log_ratio_BL, -1, keepdims=True), tokens_B1 > 0
        if cfg.ratio == "sequence":
            log_ratio = log_ratio / jnp.maximum(tokens_B1, 1)
    return bounded_exp(log_ratio, cfg.log_ratio_cap), live


def _ratio_metrics(ratio, live, clipped, log_ratio_BL):
    return {
        "grpo/ratio_mean": _masked_mean(ratio, live),
        "grpo/ratio_max": jnp.max(jnp.where(live, ratio, 0.0)),
        "grpo/clip_frac": _masked_mean(clipped.astype(ratio.dtype), live),
        "grpo/logp_gap_max": jnp.max(jnp.abs(log_ratio_BL)),
    }


def _policy_loss(ratio, logp_BL, adv, cfg):
    """The policy part per token (or per rollout), and where the clip cuts the gradient."""
    if cfg.reduction == "cispo":
        # The ratio is a detached weight: a clipped token keeps its gradient through log pi.
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, cfg.ratio_cap))
        return -weight * adv * logp_BL, (ratio > cfg.ratio_cap) & (adv != 0)
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    bounded = ratio if cfg.delta is None else jnp.minimum(ratio, cfg.delta)
    loss = -jnp.minimum(bounded * adv, jnp.clip(ratio, low, high) * adv)
    cut = ((adv > 0) & (ratio > high)) | ((adv < 0) & (ratio < low))
    return loss, cut if cfg.delta is None else cut | ((adv < 0) & (ratio > cfg.delta))


def _masked_mean(x, mask):
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
