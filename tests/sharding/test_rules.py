"""One strict table: what the compiler would quietly replicate is refused, and what is pinned really is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from tests.miniature import configs
from tests.topologies import tpu_mesh
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sharding.mesh import make_mesh, replicated, split_devices
from xomni_jax.sharding.rules import MESH_AXES, RULES, activation_spec, constrain, map_rows, param_shardings, spec_for, unconstrained


@pytest.fixture(scope="module")
def mesh():
    """2 x 2 x 2."""
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_the_table_names_mesh_axes_only():
    assert {axis for axes in RULES.values() for axis in axes or ()} <= set(MESH_AXES)


@pytest.mark.parametrize(
    "shape, axes, spec",
    [
        ((8, 5, 6), ("batch", "length", "residual"), PartitionSpec(("data", "fsdp"), None, None)),
        ((6, 10), ("embed", "mlp"), PartitionSpec(("fsdp",), ("tensor",))),
        ((3, 6, 4, 7), ("layers", "embed", "heads", "head_dim"), PartitionSpec(None, ("fsdp",), ("tensor",), None)),
        ((3,), (None,), PartitionSpec(None)),
        ((), (), PartitionSpec()),
    ],
)
def test_specs(mesh, shape, axes, spec):
    assert spec_for("x", shape, axes, mesh) == spec


def test_mesh_axes_of_size_one_split_nothing():
    assert spec_for("x", (3, 5), ("batch", "mlp"), make_mesh({}, jax.devices()[:1])) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    "shape, axes, words",
    [
        ((5, 4), ("embed", "mlp"), r"x\(5, 4\): embed=5 does not divide over mesh axes \('fsdp',\) \(2 devices\); lower that mesh axis"),
        ((6, 1), ("batch", None), r"batch=6 does not divide over mesh axes \('data', 'fsdp'\) \(4 devices\)"),
    ],
)
def test_what_does_not_fit_is_refused(mesh, shape, axes, words):
    with pytest.raises(ValueError, match=words):
        spec_for("x", shape, axes, mesh)


def test_constrain_splits_under_a_mesh(mesh):
    x = np.zeros((8, 3, 4), np.float32)

    def f(x):
        return constrain(x + 1, "batch", "length", "heads") * 1

    with jax.set_mesh(mesh):
        y = jax.jit(f)(x)
    assert y.sharding.shard_shape(y.shape) == (2, 3, 2)
    assert jax.jit(f)(x).sharding.is_fully_replicated  # no mesh: one device


def test_constrain_is_strict_under_a_mesh(mesh):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"rows\(6, 3\): batch=6 does not divide"):
        jax.jit(lambda x: constrain(x, "batch", None, name="rows"))(jnp.zeros((6, 3)))


def test_initialisation_is_not_constrained(mesh):
    with jax.set_mesh(mesh):
        with unconstrained():
            assert jax.eval_shape(lambda: constrain(jnp.zeros((1, 3)), "batch", None)).shape == (1, 3)
        with pytest.raises(ValueError):
            constrain(jnp.zeros((1, 3)), "batch", None)


@pytest.mark.parametrize("name", COMPONENTS)
def test_parameters_of_every_component_are_placed(name, mesh):
    """Under a mesh too, where the one row of the traced inputs would not split."""
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: init_params(name, configs()[name], jax.random.key(0)))
    shardings = param_shardings(boxed, mesh)
    shapes = nn.meta.unbox(boxed)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    sizes = [(s.shard_shape(x.shape), x.shape) for s, x in zip(jax.tree.leaves(shardings), jax.tree.leaves(shapes))]
    if sizes:
        whole, part = sum(np.prod(x) for _, x in sizes), sum(np.prod(p) for p, _ in sizes)
        assert part < 0.6 * whole  # the large ones are split at least two ways


@pytest.mark.parametrize(
    "axes, shape",
    [
        (None, (1, 1, 8, 1)),
        ({"fsdp": -1}, (1, 1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (1, 2, 2, 2)),
        ({"replica": 2, "data": 2, "fsdp": 2}, (2, 2, 2, 1)),
    ],
)
def test_meshes(axes, shape):
    mesh = make_mesh(axes)
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == shape
    assert replicated(mesh).is_fully_replicated


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"fdsp": 8}, "mesh axis 'fdsp' is unknown; known axes: replica, data, fsdp, tensor"),
        ({"fsdp": 3}, "mesh fsdp=3 needs 3 devices, 8 are present; change config.mesh"),
        ({"data": 3, "fsdp": -1}, "mesh data=3 needs a multiple of 3 devices, 8 are present"),
        ({"data": 16, "fsdp": -1}, "mesh data=16 needs a multiple of 16 devices"),
        ({"data": -1, "fsdp": -1}, "mesh: only one axis may be -1, got data and fsdp"),
        ({"data": 0}, "mesh data=0 is not a number of devices"),
    ],
)
def test_meshes_that_do_not_fit(axes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(axes)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of one process."""

    id: int
    process_index: int


def test_devices_apart_come_from_every_process():
    devices = [FakeDevice(i, i // 4) for i in range(8)]
    rest, apart = split_devices(devices, 2)
    assert [d.id for d in rest] == [0, 1, 2, 4, 5, 6] and [d.id for d in apart] == [3, 7]
    for wrong in (1, 8, 0):
        with pytest.raises(ValueError, match="2 processes with at least 4 devices each allow 2, 4, 6"):
            split_devices(devices, wrong)


def test_devices_apart_make_meshes_though_both_leave_holes_in_the_slice():
    rest, apart = split_devices(list(tpu_mesh("v6e:4x4", fsdp=16).devices.flat), 4)
    assert make_mesh({"fsdp": -1, "tensor": 2}, rest).shape["fsdp"] == 6 and make_mesh({"fsdp": 2, "tensor": 2}, apart).size == 4


ALL, BATCH = PartitionSpec(("data", "fsdp", "tensor"), None), PartitionSpec(("data", "fsdp"), ("tensor",))


@pytest.mark.parametrize(
    "rows, microbatch, piece, spec",
    [
        (16, 1, 8, ALL),
        (8, 1, 8, ALL),
        (48, 4, 24, ALL),
        (40, 4, 8, ALL),
        (16, 0, 16, ALL),
        (12, 2, 4, BATCH),
        (4, 2, 4, BATCH),
        (6, 1, 6, BATCH),
    ],
)
def test_rows_in_pieces(mesh, rows, microbatch, piece, spec):
    """The same values in the same order, whether rows split over all devices, over those of a batch, in pieces, or not at all."""
    tree = (jnp.arange(rows * 3.0).reshape(rows, 3), {"more": jnp.arange(rows), "none": None})

    def fn(tree):
        seen.append((len(tree[0]), activation_spec("x", (8, 2), ("batch", "heads"), mesh)))
        return {"sum": tree[0].sum(1) + tree[1]["more"]}

    seen = []
    with jax.set_mesh(mesh):
        got = jax.jit(lambda tree: map_rows(fn, tree, microbatch))(tree)
    assert set(seen) == {(piece, spec)}
    assert activation_spec("x", (8, 2), ("batch", "heads"), mesh) == BATCH
    np.testing.assert_array_equal(got["sum"], np.arange(rows * 3).reshape(rows, 3).sum(1) + np.arange(rows))
    np.testing.assert_array_equal(map_rows(fn, tree, 5)["sum"], got["sum"])
