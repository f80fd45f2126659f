"""The yardstick of the comparisons: bare matrix products of a benchmark's shape, in XLA and in torch."""

from __future__ import annotations

import jax
import numpy as np

from tests.benchmarks.peers import tensor
from tests.benchmarks.timing import Case, relative_difference

PAIRS = 8  # products up and down, one after another, so that calling a compiled program costs little beside them


def products(rows: int, width: int, hidden: int) -> Case:
    """[rows, width] x [width, hidden] x [hidden, width], eight times over: the shape of an MLP, nothing between the products."""
    import torch

    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    up = (rng.normal(size=(width, hidden)) * width**-0.5).astype(np.float32)
    down = (rng.normal(size=(hidden, width)) * hidden**-0.5).astype(np.float32)
    arrays = [jax.device_put(a) for a in (x, up, down)]
    tensors = [tensor(a) for a in (x, up, down)]

    def chain(x, up, down):
        for _ in range(PAIRS):
            x = (x @ up) @ down
        return x

    compiled = jax.jit(chain)

    def peer():
        with torch.inference_mode():
            return chain(*tensors).cpu()

    flops = 4.0 * PAIRS * rows * width * hidden
    name = f"products alone, {rows} row{'s' * (rows > 1)}"
    return Case(name, lambda: compiled(*arrays), peer, relative_difference, 1e-4, flops / 1e9, "GFLOP", yardstick=True)
