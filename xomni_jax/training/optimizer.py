"""AdamW or Muon with a learning-rate schedule, clipping, and parameters frozen by path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from xomni_jax.core.config import BelowOne, ConfigError, Natural, NonNegative, Positive, Share, check_known, check_patterns
from xomni_jax.models.transformer import STACKS
from xomni_jax.sharding.abstract import path_name

# Names of usual patterns of parameters that learn (X-Omni section 3.2). Pre-training stage 1 trains what is new beside the language model:
# vision layers, image embedding, norm and head. Stages 2 and 3, fine-tuning and RL train everything.
PHASES: dict[str, tuple[str, ...]] = {
    "vision": ("adapters/.*", "heads/.*", "mm_embed/.*", "mm_norm/.*", "mm_head/.*"),
    "all": (".*",),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the kernels of the transformer's layers and NAdamW for the rest.

    Adam changes every value by about the learning rate, which is little for norm scales of about 1 and much for kernels. If gradients are
    mostly noise (RL with few samples per step), changing few values by much learns more, and forgets less, than changing many values by
    little: see `rates`.

    Attributes:
      name: adamw, or muon for the transformer's stages (Jordan 2024; momentum b1, updates scaled to AdamW's usual size as by Liu et al.,
        arXiv 2502.16982, so that one learning rate serves both)
      learning_rate: peak learning rate, after the warm-up
      warmup_steps: steps in which the learning rate rises linearly from 0
      schedule: constant, linear or cosine, from the end of the warm-up to the last step
      final_fraction: share of learning_rate at the last step of a linear or cosine schedule
      b1: decay of the first moment; momentum of Muon
      b2: decay of the second moment
      weight_decay: decoupled weight decay; norms and biases do not decay
      clip_norm: gradients are scaled down to this global norm; 0: off
      rates: (path pattern, factor) pairs: multiples of learning_rate by parameter path, such as (".*/(scale|bias)", 100.0); the first full
        match counts, other parameters keep 1
    """

    learning_rate: Positive = 1e-3
    name: str = "adamw"
    warmup_steps: Natural = 50
    schedule: str = "cosine"
    final_fraction: Share = 0.1
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    rates: tuple[tuple[str, Positive], ...] = ()

    def __post_init__(self):
        check_known(self, name=("adamw", "muon"), schedule=("constant", "linear", "cosine"))


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update number, for a run of `steps` updates."""
    after = max(steps - cfg.warmup_steps, 1)
    if cfg.schedule == "constant":
        main = optax.constant_schedule(cfg.learning_rate)
    elif cfg.schedule == "linear":
        main = optax.linear_schedule(cfg.learning_rate, cfg.learning_rate * cfg.final_fraction, after)
    else:
        main = optax.cosine_decay_schedule(cfg.learning_rate, after, cfg.final_fraction)
    if not cfg.warmup_steps:
        return main
    # Update 0 already has a learning rate above 0: otherwise it would change nothing.
    warm = lambda count: cfg.learning_rate * (count + 1) / cfg.warmup_steps  # noqa: E731
    return optax.join_schedules([warm, main], [cfg.warmup_steps])


class Optimizer:
    """The optimizer of a run of `steps` updates. It trains the parameters that `train` names and `freeze` does not.

    Attributes:
      schedule: learning rate by update number.
      transform: the optax transformation.
      decay: of the running average of the trained parameters, which changes in every `average_every`-th update.
      averages: whether there is one: not with decay=0 and average_every=1.
    """

    def __init__(
        self,
        cfg: OptimizerConfig,
        steps: int,
        train: Sequence[str] = ("all",),
        freeze: Sequence[str] = (),
        decay: float = 0.0,
        average_every: int = 1,
    ):
        self.schedule, self.decay, self.average_every = learning_rate(cfg, steps), decay, average_every
        self.averages = decay > 0 or average_every > 1
        self._train, self._freeze, self._rates = tuple(train), tuple(freeze), cfg.rates
        adamw = optax.chain(
            optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
            scale_by_muon(cfg) if cfg.name == "muon" else optax.scale_by_adam(cfg.b1, cfg.b2),
            scale_by_path(cfg.rates) if cfg.rates else optax.identity(),
            optax.add_decayed_weights(cfg.weight_decay, decays) if cfg.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(self.schedule),
        )
        # A frozen parameter has no moments, and its update is exactly zero.
        self.transform = optax.partition({"train": adamw, "freeze": optax.set_to_zero()}, self.labels)

    def labels(self, params: Any) -> Any:
        """ "train" or "freeze" for every parameter: its path, joined by "/", must match a pattern as a whole.

        Raises:
          ConfigError: a pattern matches no parameter, or no parameter is trained.
        """
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        check_patterns([p for p in self._train if p not in PHASES], names, "config.train")
        check_patterns(self._freeze, names, "config.freeze")
        check_patterns([pattern for pattern, _ in self._rates], names, "config.optimizer.rates")
        train = [pattern for name in self._train for pattern in PHASES.get(name, (name,))]

        def learns(name: str) -> bool:
            return any(re.fullmatch(p, name) for p in train) and not any(re.fullmatch(p, name) for p in self._freeze)

        if not any(map(learns, names)):
            raise ConfigError(f"config.train={self._train}, config.freeze={self._freeze}: no parameter is left to train; freeze fewer")
        return jax.tree.unflatten(jax.tree.structure(params), ["train" if learns(name) else "freeze" for name in names])

    def trained(self, params: Any) -> dict[str, jax.Array]:
        """{path: trained parameter}."""
        leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(self.labels(params)), strict=True)
        return {path_name(path): x for (path, x), kind in leaves if kind == "train"}

    def update(self, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        """One update -> (params, opt_state, `optim/{grad,update,param}_norm`). Frozen parameters are returned as they are.

        The norms are those of the trained parameters, as clipping computes them; the gradients of frozen parameters are then unused, so
        that XLA removes their computation.
        """
        updates, opt_state = self.transform.update(grads, opt_state, params)
        labels = self.labels(params)
        new = jax.tree.map(lambda kind, p, u: (p + u).astype(p.dtype) if kind == "train" else p, labels, params, updates)

        def norm(tree):
            return global_norm(jax.tree.map(lambda kind, x: x if kind == "train" else None, labels, tree))

        return new, opt_state, {"optim/grad_norm": norm(grads), "optim/update_norm": norm(updates), "optim/param_norm": norm(new)}


def scale_by_muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for `muon_axes`, Adam with Nesterov momentum for the rest.

    Like `scale_by_adam` it applies neither the learning rate nor the sign.
    """
    # optax multiplies by minus the learning rate, so -1 leaves the direction unchanged.
    return contrib.muon(-1.0, beta=cfg.b1, adam_b1=cfg.b1, adam_b2=cfg.b2, consistent_rms=0.2, muon_weight_dimension_numbers=muon_axes)


def muon_axes(params: Any) -> Any:
    """The rows and columns that Muon sees in kernels [layers, inputs.., outputs..] of the transformer's layers; None for the rest."""

    def axes(path, x):
        stack, *_, leaf = names = path_name(path).split("/")
        if stack not in STACKS or leaf != "kernel":
            return None
        inputs = 2 if "o_proj" in names else 1
        return contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def scale_by_path(rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies the updates of parameters by the factor of the first pattern that matches their path."""

    def scale(path, update):
        return next((factor for pattern, factor in rates if re.fullmatch(pattern, path_name(path))), 1.0) * update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def decays(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices and tables, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).rsplit("/", 1)[-1] not in ("scale", "bias"), params)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
