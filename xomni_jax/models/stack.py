"""Stacks of equal layers: one scan over stacked parameters, with recomputation in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

# What the backward pass recomputes of a layer, and the policy for what is saved.
REMAT = {
    "none": None,  # nothing is recomputed
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # everything but matrix products
}


def stacked(layer: type[nn.Module], length: int, remat: str, in_axes: Sequence[Any] = (), unroll: int = 1) -> type[nn.Module]:
    """`length` equal layers as one module, which takes the layer's constructor arguments and whose parameters have a leading axis "layers".

    Args:
      layer: its `__call__(carry, *inputs)` returns `(carry, output)`; the stack returns the last carry and the stacked outputs.
      remat: a key of REMAT.
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


def check_remat(model: str, remat: str) -> None:
    """Raises ValueError unless `remat` is one of REMAT; `model` names the config."""
    if remat not in REMAT:
        raise ValueError(f"{model}.remat={remat!r} is unknown; choose one of {', '.join(REMAT)}")
