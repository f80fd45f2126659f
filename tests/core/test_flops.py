"""Operations counted from the jaxpr: by hand, through loops, remat and gradients, and for the whole transformer."""

import jax
import jax.numpy as jnp
import pytest

from tests.planner.narrow import AR, abstract_params
from xomni_jax.core.flops import count, widest
from xomni_jax.models.transformer import ARTransformer


def traced(fn, *args):
    return jax.jit(fn).trace(*args).jaxpr


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_by_hand():
    f = count(traced(lambda x, w: x @ w, shape(3, 5), shape(5, 7)))
    assert (f.weights, f.attention) == (2 * 3 * 5 * 7, 0)
    f = count(traced(lambda q, k: jnp.einsum("bld,bsd->bls", q, k), shape(2, 3, 5), shape(2, 4, 5)))
    assert (f.weights, f.attention) == (0, 2 * 2 * 3 * 4 * 5)


def test_a_convolution_by_hand():
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    f = count(traced(conv, shape(2, 6, 4, 3), shape(3, 3, 3, 5)))
    assert f.convolution == f.total == 2 * (2 * 6 * 4 * 5) * (3 * 3 * 3)


def test_loops_multiply_and_branches_take_the_dearest():
    loop = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=11)[0]  # noqa: E731
    assert count(traced(loop, shape(3, 5), shape(5, 5))).weights == 11 * 2 * 3 * 5 * 5
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)  # noqa: E731
    assert count(traced(branch, shape(3, 5), shape(5, 5))).weights == 2 * 2 * 3 * 5 * 5


def test_a_sharded_body_counts_for_all_devices_but_not_for_repetitions():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    rows = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    assert count(traced(rows, shape(8, 5), shape(5, 7))).weights == 2 * 8 * 5 * 7


@pytest.mark.parametrize("remat, recomputed", [("none", 0), ("full", 2)])
def test_the_transformer_costs_6nd_and_what_remat_repeats(remat, recomputed):
    """Per token: 2 N forward, 4 N backward, and with full remat the forward again but for each layer's last product."""
    B, L, c = 2, 40, AR(remat=remat)
    net = ARTransformer(c)

    def loss(params, ids):
        hidden = net.apply({"params": params}, ids)
        return jnp.sum(net.apply({"params": params}, hidden, method="image_logits"))

    f = count(traced(jax.grad(loss), abstract_params(c), jax.ShapeDtypeStruct((B, L), jnp.int32)))
    qo, kv, mlp = c.d_model * c.n_heads * c.head_dim, c.d_model * c.n_kv_heads * c.head_dim, c.d_model * c.mlp_dim
    layer, last = 2 * qo + 2 * kv + 3 * mlp, mlp
    expected = B * L * (c.n_layers * (6 * layer + recomputed * (layer - last)) + 6 * c.d_model * c.image_vocab_size)
    assert f.weights == pytest.approx(expected, rel=1e-3)
    forward = 2 * 2 * B * c.n_layers * c.n_heads * L * L * c.head_dim
    assert f.attention == pytest.approx(forward * (3 + recomputed // 2), rel=1e-3)


def test_the_largest_logits_are_found_inside_loops():
    def loss(x, w, keep):
        row = lambda x: jax.nn.logsumexp(x @ w, axis=-1)  # noqa: E731
        return jnp.sum(jax.lax.map(row if keep else jax.checkpoint(row), x))

    args = shape(6, 2, 3, 5), shape(5, 97)
    recomputing = traced(jax.grad(lambda *a: loss(*a, False)), *args)
    assert widest(recomputing, frozenset({97})) == (2, 3, 97)
    assert widest(recomputing, frozenset({96})) == ()
    # Kept for the backward pass, all rows exist at once.
    assert widest(traced(jax.grad(lambda *a: loss(*a, True)), *args), frozenset({97})) == (6, 2, 3, 97)
