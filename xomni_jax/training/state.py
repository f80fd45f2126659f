"""The state of a training run, created on the devices that hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from xomni_jax.sharding.abstract import leaves, path_name, placed
from xomni_jax.sharding.mesh import replicated
from xomni_jax.sharding.rules import param_shardings
from xomni_jax.training.guard import GuardConfig, counters
from xomni_jax.training.optimizer import Optimizer

SMALL = 64  # largest array of the optimizer, such as coefficients, that may be replicated without belonging to a parameter


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of updates made.
      params: unboxed parameter tree.
      opt_state: state of the optimizer.
      extra: small arrays of the stage.
      ema: {path of a trained parameter: its running average, float32}; empty without averages.
      guard: counters of skipped steps, see `training.guard`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    ema: dict[str, jax.Array] = struct.field(default_factory=dict)
    guard: dict[str, jax.Array] = struct.field(default_factory=dict)

    def starting_from(self, params: Any) -> TrainState:
        """This state with a copy of `params`, cast to the dtypes of the state; the averages start there, too."""
        params = jax.tree.map(lambda mine, given: jnp.array(given, mine.dtype), self.params, params)
        ema = {name: jnp.array(x, jnp.float32) for name, x in leaves(params) if name in self.ema}
        return self.replace(params=params, ema=ema)

    def averaged(self) -> TrainState:
        """This state with the running averages in place of the parameters that have one."""
        put = lambda path, x: self.ema.get(path_name(path), x).astype(x.dtype)  # noqa: E731
        return self.replace(params=jax.tree_util.tree_map_with_path(put, self.params)) if self.ema else self

    def apply(self, optimizer: Optimizer, grads: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer update -> (new state, optim/ metrics)."""
        params, opt_state, metrics = optimizer.update(grads, self.opt_state, self.params)
        metrics["optim/lr"] = jnp.asarray(optimizer.schedule(self.step), jnp.float32)
        ema = optax.incremental_update(optimizer.trained(params), self.ema, 1 - optimizer.decay) if self.ema else {}
        if self.ema and optimizer.average_every > 1:
            due = (self.step + 1) % optimizer.average_every == 0
            ema = jax.tree.map(lambda new, old: jnp.where(due, new, old), ema, self.ema)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def new_state(
    init: Callable[[], Any], optimizer: Optimizer, mesh: Mesh, guard: GuardConfig, extra: Callable[[], Mapping[str, jax.Array]] = dict
) -> tuple[Callable[[], TrainState], TrainState]:
    """(function that creates a fresh state, the shapes of that state with their shardings).

    The function creates every array with its sharding, so that nothing large ever exists unsharded.

    Args:
      init: creates the boxed parameters, which name their logical axes.
      guard: of the update; its counters are part of the state.
      extra: creates small arrays, which are replicated.
    """
    shardings = param_shardings(jax.eval_shape(init), mesh)

    def create():
        params = nn.meta.unbox(init())
        ema = {name: x.astype(jnp.float32) for name, x in optimizer.trained(params).items()} if optimizer.averages else {}
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params), dict(extra()), ema, counters(guard))

    abstract = jax.eval_shape(create)
    where = state_shardings(abstract, shardings, mesh)
    return jax.jit(create, out_shardings=where), placed(abstract, where)


def state_shardings(abstract: TrainState, shardings: Any, mesh: Mesh) -> TrainState:
    """Shardings of a whole state. Moments have those of their parameters, found by path and shape; the rest is replicated.

    Raises:
      ValueError: a large array of the optimizer belongs to no parameter and would be replicated.
    """
    by_name = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    shapes = {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(abstract.params)}
    everywhere = replicated(mesh)

    def place(path, leaf):
        name = path_name(path)
        parts = name.split("/")
        # The longest suffix that is the path of a parameter: `norm/scale` must not match a `scale` at the top level.
        for param in ("/".join(parts[i:]) for i in range(len(parts))):
            if param in shapes and shapes[param] == leaf.shape:
                return by_name[param]
        if leaf.size > SMALL:
            raise ValueError(f"optimizer state {name}{leaf.shape} belongs to no parameter, so every device would hold a full copy of it")
        return everywhere

    return TrainState(
        step=everywhere,
        params=shardings,
        opt_state=jax.tree_util.tree_map_with_path(place, abstract.opt_state),
        extra=jax.tree.map(lambda _: everywhere, abstract.extra),
        ema={name: by_name[name] for name in abstract.ema},
        guard=jax.tree.map(lambda _: everywhere, abstract.guard),
    )
