"""The training state is born sharded, its optimizer's moments beside their parameters, and the mesh changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from xomni_jax.models.layers import Embed, Projection, RMSNorm
from xomni_jax.sharding.abstract import path_name
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import constrain
from xomni_jax.training.guard import GuardConfig
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState, new_state, state_shardings

B, L, D, F, V = 8, 5, 16, 24, 32


class Block(nn.Module):
    """Norm, up, down, with a residual. [B, L, D] -> [B, L, D]."""

    @nn.compact
    def __call__(self, x_BLD):
        h_BLD = RMSNorm(name="norm")(x_BLD)
        h_BLF = Projection((F,), ("embed", "mlp"), bias=True, name="up")(h_BLD)
        return x_BLD + Projection((D,), ("mlp", "embed"), name="down")(jnp.tanh(h_BLF))


class Net(nn.Module):
    """A block behind an embedding; its `norm/scale` and the top one share the end of their paths and their shape."""

    @nn.compact
    def __call__(self, ids_BL):
        x_BLD = constrain(Embed(V, D, name="embed")(ids_BL), "batch", "length", "residual")
        x_BLD = RMSNorm(name="norm")(Block(name="block")(x_BLD))
        return Projection((V,), ("embed", "vocab"), name="head")(x_BLD)


def init():
    return Net().init(jax.random.key(3), jnp.zeros((B, L), jnp.int32))["params"]


def optimizer(train=(".*",)):
    return Optimizer(OptimizerConfig(0.02, warmup_steps=2, weight_decay=0.1), 10, train=train)


def run(axes: dict, devices, steps: int = 4, train=(".*",)) -> tuple[dict, TrainState, list[dict]]:
    """A short training on one mesh: (first parameters, last state, metrics of every step)."""
    mesh, opt = make_mesh(axes, devices), optimizer(train)
    ids = np.random.default_rng(0).integers(0, V, (steps, B, L))

    def step(state, ids_BL):
        def loss(params):
            logp = jax.nn.log_softmax(Net().apply({"params": params}, ids_BL[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(logp, ids_BL[:, 1:, None], -1))

        value, grads = jax.value_and_grad(loss)(state.params)
        state, metrics = state.apply(opt, grads)
        return state, metrics | {"loss": value}

    with jax.set_mesh(mesh):
        state, step, history = new_state(init, opt, mesh, GuardConfig())[0](), jax.jit(step, donate_argnums=0), []
        start = jax.tree.map(np.array, state.params)
        for batch in ids:
            state, metrics = step(state, batch)
            history.append(jax.tree.map(float, metrics))
    return start, state, history


@pytest.fixture(scope="module")
def alone():
    return run({}, jax.devices()[:1])


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_the_mesh_does_not_change_what_is_learned(axes, alone):
    """Initial values to an ulp, losses and norms to 1e-5, parameters after four updates to 1e-4 of one device's."""
    start, state, history = run(axes, jax.devices())
    for x, want in zip(jax.tree.leaves(start), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(x, want, rtol=3e-7)
    for one, want in zip(history, alone[2], strict=True):
        for name in want:
            np.testing.assert_allclose(one[name], want[name], rtol=1e-5, err_msg=name)
    for (path, x), want in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(alone[1].params)):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5, err_msg=path_name(path))
    check_placed(state, axes)


def check_placed(state: TrainState, axes: dict) -> None:
    """Every array of a real state lies where the table says, moments where their parameters do."""

    def spec(**by_axis):
        return {name: tuple(m if axes.get(m, 1) > 1 else None for m in over) for name, over in by_axis.items()}

    want = spec(up=("fsdp", "tensor"), down=("tensor", "fsdp"), embed=("tensor", "fsdp"), head=("fsdp", "tensor"))
    seen = 0
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        module = path_name(path).split("/")[-2]
        expected = want.get(module, ()) if x.ndim == 2 else want[module][-1:] if module == "up" and x.ndim else ()
        sharding = jax.sharding.NamedSharding(x.sharding.mesh, PartitionSpec(*expected))
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (path_name(path), x.sharding)
        seen += x.ndim == 2
    assert seen == 3 * 4, "four matrices, each with two moments"
    assert state.step.sharding.is_fully_replicated and int(state.step) == 4


def test_the_start_is_sharded():
    """Nothing large exists whole: each of eight devices holds an eighth of a matrix from its birth."""
    state = new_state(init, optimizer(), make_mesh(dict(fsdp=8)), GuardConfig(), extra=lambda: {"usage": jnp.arange(3.0)})[0]()
    kernel = state.params["block"]["up"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(D // 8, F)}
    assert state.extra["usage"].sharding.is_fully_replicated and int(state.step) == 0


def test_moments_exist_for_what_learns_only_and_frozen_arrays_stay():
    start, state, _ = run(dict(data=2, fsdp=2, tensor=2), jax.devices(), steps=2, train=("block/.*",))
    moments = [path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim]
    assert len(moments) == 2 * 4 and all("/block/" in name for name in moments)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(start), strict=True):
        learns = path_name(path).startswith("block/")
        assert (np.asarray(x).tobytes() != y.tobytes()) == learns, path_name(path)


def test_step_metrics(alone):
    """Learning rate of the step that was made, and norms of everything."""
    _, state, history = alone
    assert [m["optim/lr"] for m in history[:2]] == pytest.approx([0.01, 0.02])
    total = np.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(state.params)))
    np.testing.assert_allclose(history[-1]["optim/param_norm"], total, rtol=1e-6)
    assert set(history[0]) == {"loss", "optim/lr", "optim/grad_norm", "optim/update_norm", "optim/param_norm"}


def test_an_optimizer_array_without_a_parameter_is_refused():
    mesh = make_mesh(dict(fsdp=8))
    abstract = new_state(init, optimizer(), mesh, GuardConfig())[1]
    stray = abstract.replace(opt_state={"mu": {"elsewhere": jax.ShapeDtypeStruct((64, 64), jnp.float32)}})
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, PartitionSpec()), abstract.params)
    with pytest.raises(ValueError, match=r"mu/elsewhere\(64, 64\) belongs to no parameter"):
        state_shardings(stray, shardings, mesh)


def test_moments_follow_the_longest_matching_path():
    """`second/norm/scale` ends like the top level's `norm/scale`; each moment must follow its own parameter."""
    mesh = make_mesh(dict(fsdp=8))
    leaf = jax.ShapeDtypeStruct((16,), jnp.float32)
    params = {"norm": {"scale": leaf}, "second": {"norm": {"scale": leaf}}}
    split, whole = (jax.sharding.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {"mu": params}, {})
    for top, inner in ((split, whole), (whole, split)):
        placed = state_shardings(abstract, {"norm": {"scale": top}, "second": {"norm": {"scale": inner}}}, mesh)
        assert placed.opt_state == {"mu": {"norm": {"scale": top}, "second": {"norm": {"scale": inner}}}}
