"""Table lookups: values, gradients by hand, and how they are laid out on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xomni_jax.models.layers import lookup
from xomni_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lookup_and_its_gradient(rng, dtype):
    table, weight = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(4, 3, 8)).astype(np.float32)
    ids = np.array([[0, 5, 5], [2, 9, -1], [5, 5, 5], [1, 1, 0]])  # 9 and -1 are clamped
    inside = np.clip(ids, 0, 5)

    def loss(table):
        return jnp.sum(lookup(table, ids, 6, dtype, jnp.float32).astype(jnp.float32) * weight)

    mesh = make_mesh(dict(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
        rows, gradient = jax.jit(lambda t: (lookup(t, ids, 6, dtype, jnp.float32), jax.grad(loss)(t)))(placed)
    assert rows.dtype == dtype and gradient.dtype == jnp.float32 and gradient.sharding.spec == PartitionSpec("tensor", "fsdp")
    np.testing.assert_array_equal(rows, table.astype(dtype)[inside])
    expected = np.zeros_like(table)
    np.add.at(expected, inside, weight.astype(dtype).astype(np.float32))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_equal_rows_are_summed_in_float32():
    """In bfloat16 a sum of ones would stop at 256."""
    ids = jnp.zeros(1000, jnp.int32)
    gradient = jax.grad(lambda t: jnp.sum(lookup(t, ids, 2, jnp.bfloat16, jnp.float32).astype(jnp.float32)))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, [[1000.0] * 3, [0.0] * 3])
