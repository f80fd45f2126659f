"""Stacks of equal layers: one scan over stacked parameters, with recomputation in the backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.models.layers import Dtype

# What the backward pass recomputes of a layer, and the policy for what is saved.
REMAT = {
    "none": None,  # nothing is recomputed
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # everything but matrix products
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Fields that the configs of all stacks of layers have.

    Attributes:
      dtype: number format of the computation
      param_dtype: number format of the parameters
      remat: what the backward pass recomputes of a layer: none, full, or dots (everything but matrix products)
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"{type(self).__name__}.remat={self.remat!r} is unknown; choose one of {', '.join(REMAT)}")


def stacked(layer: type[nn.Module], length: int, remat: str, in_axes: Sequence[Any] = (), unroll: int = 1) -> type[nn.Module]:
    """`length` equal layers as one module, which takes the layer's constructor arguments and whose parameters have a leading axis "layers".

    Args:
      layer: its `__call__(carry, *inputs)` returns `(carry, output)`; the stack returns the last carry and the stacked outputs.
      remat: see `StackConfig`.
      in_axes: for each of the inputs `nn.broadcast` (every layer gets it) or 0 (layer i gets index i of its first axis).
      unroll: layers per loop step; the tiny presets unroll whole stacks, which a CPU runs without loop overhead.
    """
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=min(unroll, length),
    )
