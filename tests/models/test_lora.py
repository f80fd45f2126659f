"""Adapters: against gradients by hand, merged kernels, int8 bases and peft."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict

from tests.miniature import configs, random_params
from xomni_jax.core.config import ConfigError
from xomni_jax.models.int8 import quantize
from xomni_jax.models.layers import Projection
from xomni_jax.models.lora import LoRAConfig, init_adapters, join, merge, projections
from xomni_jax.models.registry import COMPONENTS, boxed_shapes
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

AR = dataclasses.replace(configs()["transformer"], n_language_layers=2)
CFG = LoRAConfig(rank=3, alpha=7.5)
IDS = np.array([[3, 5, 400, 410, 7]])


def random_adapters(name, model_cfg, cfg, seed=5):
    """Adapters without a zero among them."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: meta.unbox(init_adapters(name, model_cfg, cfg, jax.random.key(0))))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(cfg, params):
    return COMPONENTS["transformer"].module(cfg).apply({"params": params}, IDS)


def hidden(cfg, params):
    return np.asarray(_hidden(cfg, params))


@pytest.fixture(scope="module")
def base():
    return random_params("transformer", AR, 1)


def test_one_layer_by_hand(rng):
    """Values and gradients of y = x (w + scale a b), contracted over two axes, and bias after it."""
    layer = Projection((5,), ("heads", "head_dim", "embed"), contract=2, bias=True)
    x, w, a, b, t = (rng.normal(size=s).astype(np.float32) for s in ((4, 2, 3), (2, 3, 5), (2, 3, 2), (2, 5), (4, 5)))
    base, adapters, scale = {"kernel": w, "bias": np.ones(5, np.float32)}, {"lora_a": a, "lora_b": b}, 0.7
    loss = lambda p: jnp.sum(t * layer.apply({"params": join({"l": base}, {"l": p}, scale)["l"]}, x))  # noqa: E731
    value, grads = jax.value_and_grad(loss)(adapters)
    x2, w2, a2 = x.reshape(4, 6), w.reshape(6, 5), a.reshape(6, 2)
    np.testing.assert_allclose(value, np.sum(t * (x2 @ (w2 + scale * a2 @ b) + 1)), rtol=1e-5)
    np.testing.assert_allclose(grads["lora_a"].reshape(6, 2), scale * x2.T @ t @ b.T, rtol=1e-5)
    np.testing.assert_allclose(grads["lora_b"], scale * a2.T @ x2.T @ t, rtol=1e-5)


def test_a_step_of_full_rank_is_the_gradient_step_of_the_kernel(rng):
    """With a = 1, b = 0 and scale 1, a descent step of b moves the merged kernel by the kernel's own gradient."""
    layer, x = Projection((4,), ("embed", "mlp")), rng.normal(size=(9, 6)).astype(np.float32)
    w, t, rate = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32), 0.05
    adapters = {"lora_a": jnp.eye(6), "lora_b": jnp.zeros((6, 4))}
    square = lambda p: 0.5 * jnp.sum((layer.apply({"params": p}, x) - t) ** 2)  # noqa: E731
    grads = jax.grad(lambda p: square({"kernel": w} | p))(adapters)
    stepped = adapters | {"lora_b": adapters["lora_b"] - rate * grads["lora_b"]}
    merged = merge({"l": {"kernel": jnp.asarray(w)}}, {"l": stepped}, 1.0)["l"]["kernel"]
    np.testing.assert_allclose(merged, w - rate * x.T @ (x @ w - t), rtol=1e-4, atol=1e-5)


def test_new_adapters_change_nothing_and_are_as_large_as_they_say(base):
    adapters = meta.unbox(init_adapters("transformer", AR, CFG, jax.random.key(3)))
    np.testing.assert_array_equal(hidden(AR, join(base, adapters, CFG.scale)), hidden(AR, base))
    flat = flatten_dict(adapters, sep="/")
    assert flat["language/attn/q_proj/lora_a"].shape == (2, 32, 3) and flat["language/attn/q_proj/lora_b"].shape == (2, 3, 4, 8)
    assert flat["heads/attn/o_proj/lora_a"].shape == (1, 4, 8, 3) and flat["heads/attn/o_proj/lora_b"].shape == (1, 3, 32)
    assert len(flat) == 2 * 7 * 3, "a and b of seven projections in three stacks"
    first = np.asarray(flat["language/mlp/down_proj/lora_a"])  # uniform within 1 / sqrt(inputs)
    assert 0.9 < np.abs(first).max() * 48**0.5 <= 1 and not np.array_equal(first[0], first[1])


def test_merged_kernels_compute_what_the_adapters_do(base):
    """In stacks of one layer and of two, and in the layers alone that are targeted."""
    for targets in ((".*",), ("language/.*_proj", "heads/mlp/down_proj")):
        cfg = dataclasses.replace(CFG, targets=targets)
        adapters = random_adapters("transformer", AR, cfg)
        joined, merged = hidden(AR, join(base, adapters, cfg.scale)), hidden(AR, merge(base, adapters, cfg.scale))
        np.testing.assert_allclose(joined, merged, rtol=2e-4, atol=2e-4)
        assert np.abs(merged - hidden(AR, base)).max() > 0.1
    assert {path.split("/")[0] for path in flatten_dict(adapters, sep="/")} == {"language", "heads"}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_frozen_base_in_fewer_bits(base, dtype):
    """The adapters stay exact: base and adapters are as near to the float model as the base alone is."""
    adapters = jax.tree.map(lambda x: 0.1 * x, random_adapters("transformer", AR, CFG))
    if dtype == "int8":
        small = dataclasses.replace(AR, int8=True)
        less = quantize(base, boxed_shapes("transformer", small))
        assert less["language"]["mlp"]["up_proj"]["kernel"].dtype == jnp.int8
    else:
        small, less = AR, jax.tree.map(lambda x: x.astype(dtype), base)
    error = lambda got, want: np.linalg.norm(got - want) / np.linalg.norm(want)  # noqa: E731
    alone = error(hidden(small, less), hidden(AR, base))
    both = error(hidden(small, join(less, adapters, CFG.scale)), hidden(AR, join(base, adapters, CFG.scale)))
    assert 0 < alone < 0.05 and 0 < both < 3 * alone


def test_every_projection_of_the_models_that_learn_can_be_adapted():
    """`join` and `merge` agree on each kernel's axes: the product has the kernel's shape, split by the one table."""
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    for name in ("transformer", "mmdit"):
        cfg = configs()[name]
        boxed = jax.eval_shape(lambda: init_adapters(name, cfg, LoRAConfig(rank=2), jax.random.key(0)))  # noqa: B023
        kernels = flatten_dict(meta.unbox(boxed_shapes(name, cfg)), sep="/")
        for path in projections(name, cfg)[0]:
            a, b = (flatten_dict(meta.unbox(boxed), sep="/")[f"{path}/lora_{x}"] for x in "ab")
            kernel = kernels[f"{path}/kernel"].shape
            layers = a.ndim + b.ndim - 2 - len(kernel)
            assert layers in (0, 1) and a.shape[:-1] + b.shape[layers + 1 :] == kernel, path
        split = {path[-1].key: s for path, s in jax.tree_util.tree_leaves_with_path(param_shardings(boxed, mesh))}
        assert not any(s.is_fully_replicated for s in split.values())


def test_a_target_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="config.lora.targets: '.*/query' matches no dense layer; the nearest paths are .*/"):
        init_adapters("transformer", AR, LoRAConfig(rank=2, targets=(".*/q_proj", ".*/query")), jax.random.key(0))


@pytest.mark.parity
def test_peft_computes_the_same(rng):
    """The forward pass of peft's Linear with the same numbers, one kernel at a time, merged and not."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    w, a, b, x = (rng.normal(size=s).astype(np.float32) for s in ((12, 10), (12, 4), (4, 10), (3, 12)))
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False)), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.from_numpy(w.T))
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a.T))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b.T))
        theirs = model(torch.from_numpy(x)).numpy()
    scale, adapters = LoRAConfig(rank=4, alpha=6).scale, {"l": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
    apply = lambda p: Projection((10,), ("embed", "mlp")).apply({"params": p["l"]}, x)  # noqa: E731
    kernel = {"l": {"kernel": jnp.asarray(w)}}
    for ours in (apply(join(kernel, adapters, scale)), apply(merge(kernel, adapters, scale))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
