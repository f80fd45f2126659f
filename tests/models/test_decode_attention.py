"""The decode kernel: its numbers in interpret mode, and that it compiles for every supported generation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.topologies import tpu_mesh
from xomni_jax.models.cached_attention import cached_attention
from xomni_jax.models.decode_attention import step_kernel
from xomni_jax.sharding.mesh import make_mesh

LAYERS = 2


def caches(make, P: int, R: int, K: int, S: int, T: int, H: int):
    prompt, made = (LAYERS, P, K, S, H), (LAYERS, P, R, K, T, H)
    return tuple(make(shape) for shape in (prompt, prompt, made, made))


@pytest.mark.parametrize("mesh", [{}, dict(data=2, tensor=2)], ids=["one device", "data 2 x tensor 2"])
@pytest.mark.parametrize("column", [0, 128, [[0, 70, 128], [3, 64, 65]]], ids=["empty", "full", "ragged"])
def test_equals_plain(rng, mesh, column):
    """Prompts of several lengths, filled and empty parts of the cache, query heads that do not fill a tile."""
    P, R, K, G, S, T, H = 2, 3, 2, 3, 530, 128, 16  # the prompt is no whole number of blocks
    make = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v, past = make((P, R, K, G, H)), make((P, R, K, H)), make((P, R, K, H)), caches(make, P, R, K, S, T, H)
    lengths, column = jnp.array([5, 530]), jnp.broadcast_to(jnp.int32(column), (P, R))
    # What lies behind the filled part may be anything.
    filled = (jnp.arange(T) < column[..., None])[:, :, None, :, None]
    past = tuple(jnp.where(filled, x, 1e30) if x.ndim == 6 else x for x in past)
    for layer in range(LAYERS):
        expected = cached_attention(q, k, v, tuple(jnp.where(jnp.abs(x[layer]) < 1e20, x[layer], 0) for x in past), lengths, column)
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])):
            got = jax.jit(step_kernel)(q, k, v, past, jnp.int32(layer), lengths, column)
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_compiles_for_every_generation(topology, tensor):
    """The released sizes: 28 query and 4 KV heads, a prompt of 512 tokens and 5,184 codes for each of 16 rollouts."""
    mesh, (P, R, K, G, H) = tpu_mesh(topology, data=4 // tensor, tensor=tensor), (4, 16, 4, 7, 128)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    arrays = shape((P, R, K, G, H)), shape((P, R, K, H)), shape((P, R, K, H)), caches(shape, P, R, K, 512, 5184, H)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(step_kernel)
            .trace(*arrays, scalar, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((P,), (P, R))))
            .lower(lowering_platforms=("tpu",))
            .compile()
        )
    assert "tpu_custom_call" in compiled.as_text()
