"""GRPO's update: log-probs of rollouts replayed under the policy, their loss, and optimizer steps in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.lora import LoRAConfig, join
from xomni_jax.models.vocab_heads import with_image_head
from xomni_jax.rl.control import Control, LossWeights
from xomni_jax.rl.objectives import GRPOConfig, grpo_loss, join_metrics, loss_items
from xomni_jax.sampling.generate import replay_logp
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.training.accumulate import gradient, join_rows, split_rows
from xomni_jax.training.state import TrainState


class RolloutBatch(NamedTuple):
    """Everything the update needs, one row per rollout, rollouts of a prompt side by side.

    `sampling_mask` [B, T, bytes] only where sampling truncates; `negative` (ids, lengths) only where it is guided.
    """

    ids_BS: jax.Array
    lengths_B: jax.Array
    codes_BT: jax.Array
    sampler_logp_BT: jax.Array
    sampling_mask: jax.Array | None
    negative: tuple[jax.Array, jax.Array] | None
    adv_B: jax.Array
    ok_B: jax.Array


class Policy(NamedTuple):
    """The policy network with how it samples: what a log-prob of a rollout depends on.

    With a `base` the parameters of its methods are adapters (`models.lora`), none of them ({}) for the base alone.
    """

    model: nn.Module
    sampling: SamplingConfig
    chunk: int
    base: Any = None
    scale: float = 1.0

    def on(self, base: Any, scale: float) -> Policy:
        """The policy of adapters on a frozen base."""
        return self._replace(base=self.ready(base), scale=scale)

    def ready(self, params: Any) -> Any:
        """Parameters for many calls of `logp`: the image head is gathered once for all of them."""
        return with_image_head(params, self.model.cfg) if self.base is None else params

    def logp(self, params: Any, batch: RolloutBatch) -> tuple[jax.Array, jax.Array]:
        """Log-prob and entropy [B, T] of the sampled codes under `params`, replaying the sampler."""
        b, params = batch, join(self.base, params, self.scale)
        return replay_logp(self.model, params, b.ids_BS, b.lengths_B, b.codes_BT, self.sampling, b.sampling_mask, b.negative, self.chunk)


def grpo_update(
    policy: Policy,
    optimizer: Any,
    state: TrainState,
    ref_params: Any,
    batch: RolloutBatch,
    cfg: GRPOConfig,
    micro_batches: int = 1,
    key: jax.Array | None = None,
    weights: LossWeights | None = None,
    beside: Callable[[Any], tuple[Any, dict[str, jax.Array]]] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`updates_per_batch` optimizer updates on one batch of rollouts; with one, the batch is on-policy and the ratio is 1.

    With several, old log-probs are computed once before the first, and the rows are shuffled by `key` into as many minibatches.
    Gradients are accumulated over `micro_batches` and equal those of the whole batch. Metrics of several updates are joined,
    except `grpo/logp_gap_max`: trainer against sampler in the first update, before anything has changed.

    Args:
      weights: see `grpo_loss`.
      beside: parameters -> (gradient that is added in every update, metrics).
    """
    several = cfg.updates_per_batch > 1
    old = frozen_logp(policy, state.params, batch, micro_batches) if several else None
    ref = None if ref_params is None else frozen_logp(policy, ref_params, batch, micro_batches)
    rows = (batch, old, ref)

    def one_update(state: TrainState, rows: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = loss_and_gradient(policy, state.params, rows, cfg, micro_batches, weights)
        if beside is not None:
            more, told = beside(state.params)
            grads, metrics = jax.tree.map(jnp.add, grads, more), metrics | told
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    if not several:
        return one_update(state, rows)
    order_B = jax.random.permutation(key, batch.adv_B.shape[0])
    minibatches = split_rows(jax.tree.map(lambda x: x[order_B], rows), cfg.updates_per_batch)
    state, stacked = jax.lax.scan(one_update, state, minibatches)
    joined = {name: (jnp.max if name.endswith("_max") else jnp.mean)(value) for name, value in stacked.items()}
    return state, joined | {"grpo/logp_gap_max": stacked["grpo/logp_gap_max"][0]}


def loss_and_gradient(
    policy: Policy, params: Any, rows: Any, cfg: GRPOConfig, parts: int, weights: LossWeights | None = None
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient and metrics of (rollouts, their old log-probs, those of the reference), accumulated over `parts` micro-batches."""
    mask = lambda b: jnp.broadcast_to(b.ok_B[:, None], b.codes_BT.shape)  # noqa: E731
    n_items = loss_items(mask(rows[0]), cfg)

    def loss(ready, part):
        b, old, ref = part
        logp_BT, entropy_BT = policy.logp(ready, b)
        value, metrics = grpo_loss(logp_BT, old, ref, b.adv_B, mask(b), cfg, n_items, entropy_BT, weights)
        gap = jnp.max(jnp.where(mask(b), jnp.abs(logp_BT - b.sampler_logp_BT), 0.0))
        return value, metrics | {"grpo/logp_gap_max": gap}

    grads, metrics, value = gradient(loss, params, rows, parts, join_metrics, policy.ready)
    return grads, metrics | {"loss/grpo": value}


def frozen_logp(policy: Policy, params: Any, batch: RolloutBatch, parts: int) -> jax.Array:
    """Log-probs [B, T] of the rollouts, computed in `parts` pieces one after the other; no gradient flows."""
    params = policy.ready(params)
    return join_rows(jax.lax.map(lambda b: jax.lax.stop_gradient(policy.logp(params, b)[0]), split_rows(batch, parts)))


Advantages = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_update(
    policy: Policy,
    optimizer: Any,
    grpo: GRPOConfig,
    advantages: Advantages,
    control: Control,
    parts: int,
    lora: LoRAConfig = LoRAConfig(),
    average: bool = False,
    beside: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The jitted update (state, frozen, batch, rewards [P, R], advantages [P, R] | None, key, signals [S], packed) -> (state, metrics).

    `frozen` is the reference, None without a KL term; with adapters it is their base, which is the reference as well. `signals`: what
    the rollouts gave for those of `control.restraint`. `packed`: rows for `beside`.

    Args:
      advantages: (rewards [P, R], which of them are known [P, R]) -> (advantages [P, R], metrics); used where none are given.
      parts: micro-batches of an update. The state is donated.
      average: the reference is the state's running average instead.
      beside: (policy, parameters, packed rows, parts) -> (gradient that is added, metrics), such as `supervised_gradient`.
    """

    def update(state, frozen, batch, reward_PR, given_PR, key, signal_S=None, packed=None):
        learner, reference = (policy.on(frozen, lora.scale), {} if grpo.kl_coef else None) if lora.rank else (policy, frozen)
        if average and grpo.kl_coef:
            reference = state.averaged().params
        adv_PR, metrics = advantages(reward_PR, batch.ok_B.reshape(reward_PR.shape))
        adv_PR = adv_PR if given_PR is None else given_PR
        batch = batch._replace(adv_B=adv_PR.reshape(-1))
        added = beside and (lambda params: beside(learner, params, packed, parts))
        extra, weights, controlled = control.before(state.extra, signal_S)
        state, learned = grpo_update(learner, optimizer, state, reference, batch, grpo, parts, key, weights, added)
        return state.replace(extra=control.after(extra, state.step, learned)), metrics | controlled | learned

    return jax.jit(update, donate_argnums=0)
