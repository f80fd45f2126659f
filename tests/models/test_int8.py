"""Kernels in 8 bits against the float model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.miniature import random_params
from xomni_jax.models import mmdit, text_encoders
from xomni_jax.models.int8 import quantize, quantize_kernel
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

CONFIGS = {"mmdit": mmdit.PRESETS["tiny"], "t5": text_encoders.T5_PRESETS["tiny"]}


def test_a_kernel_is_within_half_a_step(rng):
    kernel = rng.normal(size=(6, 4, 5)).astype(np.float32) * np.array([1e-3, 1, 100, 0, 5])
    q, scale = quantize_kernel(jnp.asarray(kernel), (0, 1))
    assert q.dtype == jnp.int8 and q.shape == kernel.shape and scale.shape == (5,)
    assert int(jnp.max(jnp.abs(q))) == 127 and float(scale[3]) == 1.0
    assert (np.abs(q * np.asarray(scale) - kernel) <= np.asarray(scale) * 0.5001).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_model_is_close(name, rng):
    cfg = CONFIGS[name]
    small = dataclasses.replace(cfg, int8=True)
    params = random_params(name, cfg, 1)
    boxed = jax.eval_shape(lambda: init_params(name, small, jax.random.key(0)))
    quantised = quantize(params, boxed)
    # The tree is exactly what the int8 model declares, so it can be placed by the same table.
    shapes = jax.tree.map(
        lambda x, s: (x.shape, x.dtype), quantised, param_shardings(boxed, make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4]))
    )
    assert shapes == jax.tree.map(lambda b: (b.value.shape, b.value.dtype), boxed, is_leaf=lambda b: hasattr(b, "value"))
    bytes_of = lambda tree: sum(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(tree) if "kernel" in str(path[-1]))  # noqa: E731
    assert bytes_of(quantised) < 0.3 * bytes_of(params)  # of float32

    args = [
        jnp.asarray(rng.normal(size=x.shape), x.dtype) if getattr(x, "dtype", None) == jnp.float32 else x
        for x in COMPONENTS[name].inputs(cfg)
    ]
    if name == "mmdit":
        args[1] = jnp.array([0.5])
    run = lambda c, p: np.asarray(COMPONENTS[name].module(c).apply({"params": p}, *args))  # noqa: E731
    expected, got = run(cfg, params), run(small, quantised)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03, f"{name}: relative error {error:.4f}"
