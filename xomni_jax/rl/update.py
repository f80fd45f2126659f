"""GRPO's update: log-probs of rollouts replayed under the policy, their loss, and optimizer steps in micro-batches."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.lora import LoRAConfig, join
from xomni_jax.models.vocab_heads import with_image_head
from xomni_jax.rl.control import Control, LossWeights
from xomni_jax.rl.objectives import GRPOConfig, grpo_loss, importance, join_metrics, loss_items
from xomni_jax.rl.trajectory import Rows
from xomni_jax.sampling.engine import Engine
from xomni_jax.training.accumulate import gradient, join_rows, split_rows
from xomni_jax.training.state import TrainState


class Policy(NamedTuple):
    """The policy network: what the log-probs of a trajectory depend on, beside how its segments were drawn. `chunk`: see `Engine.score`.

    With a `base` the parameters of its methods are adapters (`models.lora`), none of them ({}) for the base alone.
    """

    model: nn.Module
    chunk: int
    base: Any = None
    scale: float = 1.0

    def on(self, base: Any, scale: float) -> Policy:
        """The policy of adapters on a frozen base."""
        return self._replace(base=self.ready(base), scale=scale)

    def ready(self, params: Any) -> Any:
        """Parameters for many calls of `logp`: the image head is gathered once for all of them."""
        return with_image_head(params, self.model.cfg) if self.base is None else params

    def logp(self, params: Any, rows: Rows) -> list[tuple[jax.Array, jax.Array]]:
        """Log-prob and entropy [B, L] of each drawn segment under `params`, replaying the sampler."""
        params, score = join(self.base, params, self.scale), Engine(self.model).score
        return [found for t in rows.passes for found in score(params, t.prompts, t.segments, t.negative, self.chunk)]


def grpo_update(
    policy: Policy,
    optimizer: Any,
    state: TrainState,
    ref_params: Any,
    batch: Rows,
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
    order_B = jax.random.permutation(key, batch.ok[0].shape[0])
    minibatches = split_rows(jax.tree.map(lambda x: x[order_B], rows), cfg.updates_per_batch)
    state, stacked = jax.lax.scan(one_update, state, minibatches)
    joined = {name: (jnp.max if name.endswith("_max") else jnp.mean)(value) for name, value in stacked.items()}
    return state, joined | {"grpo/logp_gap_max": stacked["grpo/logp_gap_max"][0]}


def loss_and_gradient(
    policy: Policy, params: Any, rows: Any, cfg: GRPOConfig, parts: int, weights: LossWeights | None = None
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient and metrics of (trajectories, their old log-probs, those of the reference), accumulated over `parts` micro-batches.

    The loss is the sum of those of the drawn segments, each with its own advantages, mask and normalisation.
    """
    n_items = [loss_items(mask_BL, cfg) for mask_BL in rows[0].masks]

    def loss(ready, part):
        t, *others = part
        old, ref = ([None] * len(n_items) if x is None else x for x in others)
        each = []
        for n, (logp_BL, entropy_BL) in enumerate(policy.logp(ready, t)):
            importance_BL, apart = None, {}
            if cfg.importance_cap:
                before_BL = logp_BL if old[n] is None else old[n]
                importance_BL, apart = importance(before_BL, t.drawn[n].logp, t.masks[n], cfg.importance_cap)
            value, metrics = grpo_loss(
                logp_BL, old[n], ref[n], t.advantage[n], t.masks[n], cfg, n_items[n], entropy_BL, weights, importance_BL
            )
            gap = jnp.max(jnp.where(t.masks[n], jnp.abs(logp_BL - t.drawn[n].logp), 0.0))
            each.append((value, metrics | apart | {"grpo/logp_gap_max": gap}))
        values, metrics = zip(*each)
        joined = metrics[0] if len(each) == 1 else join_metrics(jax.tree.map(lambda *x: jnp.stack(x), *metrics))
        return functools.reduce(operator.add, values), joined

    grads, metrics, value = gradient(loss, params, rows, parts, join_metrics, policy.ready)
    return grads, metrics | {"loss/grpo": value}


def frozen_logp(policy: Policy, params: Any, batch: Rows, parts: int) -> list[jax.Array]:
    """Log-probs [B, L] of the drawn segments, computed in `parts` pieces one after the other; no gradient flows."""
    params = policy.ready(params)

    def piece(t: Rows) -> list[jax.Array]:
        return [jax.lax.stop_gradient(logp_BL) for logp_BL, _ in policy.logp(params, t)]

    return join_rows(jax.lax.map(piece, split_rows(batch, parts)))


Advantages = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_update(
    policy: Policy,
    optimizer: Any,
    grpo: GRPOConfig,
    advantages: Advantages | None,
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
        None: the rows bring their own, of each drawn segment.
      parts: micro-batches of an update. The state is donated.
      average: the reference is the state's running average instead.
      beside: (policy, parameters, packed rows, parts) -> (gradient that is added, metrics), such as `supervised_gradient`.
    """

    def update(state, frozen, batch, reward_PR, given_PR, key, signal_S=None, packed=None):
        learner, reference = (policy.on(frozen, lora.scale), {} if grpo.kl_coef else None) if lora.rank else (policy, frozen)
        if average and grpo.kl_coef:
            reference = state.averaged().params
        metrics = {}
        if advantages is not None:
            adv_PR, metrics = advantages(reward_PR, batch.ok[0].reshape(reward_PR.shape))
            adv_PR = adv_PR if given_PR is None else given_PR
            batch = batch.replace(advantage=(adv_PR.reshape(-1),) * len(batch.drawn))
        added = beside and (lambda params: beside(learner, params, packed, parts))
        extra, weights, controlled = control.before(state.extra, signal_S)
        state, learned = grpo_update(learner, optimizer, state, reference, batch, grpo, parts, key, weights, added)
        return state.replace(extra=control.after(extra, state.step, learned)), metrics | controlled | learned

    return jax.jit(update, donate_argnums=0)
