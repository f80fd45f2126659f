"""The state of a training run, created where it lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from xomni_jax.sharding.abstract import path_name
from xomni_jax.sharding.mesh import replicated
from xomni_jax.sharding.rules import param_shardings
from xomni_jax.training.optimizer import Optimizer

SMALL = 64  # values of an optimizer's own, such as coefficients, that may lie on every device


@struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
      step: int32 scalar, updates made. params: unboxed parameter tree. opt_state: of the optimizer.
      extra: small arrays a stage carries along.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any

    def starting_from(self, params: Any) -> TrainState:
        """The same state with a copy of these parameters, in the state's own number formats."""
        return self.replace(params=jax.tree.map(lambda mine, given: jnp.array(given, mine.dtype), self.params, params))

    def apply(self, optimizer: Optimizer, grads: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer update -> (new state, optim/ metrics)."""
        params, opt_state, metrics = optimizer.update(grads, self.opt_state, self.params)
        metrics["optim/lr"] = jnp.asarray(optimizer.schedule(self.step), jnp.float32)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state), metrics


def new_state(
    init: Callable[[], Any], optimizer: Optimizer, mesh: Mesh, extra: Callable[[], Mapping[str, jax.Array]] = dict
) -> tuple[Callable[[], TrainState], TrainState]:
    """(creates a fresh state, every array born with its sharding; the state's shapes with their shardings).

    Args:
      init: makes the boxed parameters (they name their logical axes).
      extra: makes small arrays, replicated.
    """
    shardings = param_shardings(jax.eval_shape(init), mesh)

    def create():
        params = nn.meta.unbox(init())
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params), dict(extra()))

    abstract = jax.eval_shape(create)
    placed = state_shardings(abstract, shardings, mesh)
    return jax.jit(create, out_shardings=placed), jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )


def state_shardings(abstract: TrainState, shardings: Any, mesh: Mesh) -> TrainState:
    """Shardings of a whole state: moments are placed as their parameters, found by path and shape; the rest is replicated.

    Raises:
      ValueError: an array of the optimizer as large as a parameter belongs to none, and would silently be replicated.
    """
    by_name = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    shapes = {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(abstract.params)}
    everywhere = replicated(mesh)

    def place(path, leaf):
        name = path_name(path)
        parts = name.split("/")
        # The longest ending that is a parameter's path: `norm/scale` must not be taken for the `scale` of the top level.
        for param in ("/".join(parts[i:]) for i in range(len(parts))):
            if param in shapes and shapes[param] == leaf.shape:
                return by_name[param]
        if leaf.size > SMALL:
            raise ValueError(f"optimizer state {name}{leaf.shape} belongs to no parameter; every device would hold it whole")
        return everywhere

    return TrainState(
        step=everywhere,
        params=shardings,
        opt_state=jax.tree_util.tree_map_with_path(place, abstract.opt_state),
        extra=jax.tree.map(lambda _: everywhere, abstract.extra),
    )
