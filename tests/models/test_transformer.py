"""The unified transformer: parity with the torch reference (golden file), the vision rule, packing, meshes, chunked heads."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from jax.sharding import NamedSharding, PartitionSpec

from tests.name_tables import to_params, to_tensors
from tests.parity.reference_transformer import SIZES
from xomni_jax.checkpoint.conversion import flatten
from xomni_jax.checkpoint.names.transformer import table
from xomni_jax.models.transformer import PRESETS, ARConfig, ARTransformer
from xomni_jax.models.vocab_heads import head_logp, select
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

CFG = ARConfig(**SIZES)
GOLDEN = Path(__file__).parents[1] / "goldens" / "transformer.npz"
# Sequences of text, image and text again; ids from 23 on are multimodal.
IDS = np.array([[1, 5, 9, 24, 30, 41, 23, 7, 3, 2], [4, 25, 26, 8, 40, 33, 27, 28, 6, 11]], np.int32)


@functools.cache
def _wanted():
    boxed = jax.eval_shape(ARTransformer(CFG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten(meta.unbox(boxed)).items()}


def random_params(cfg: ARConfig, seed: int = 0):
    """The boxed shapes and random unboxed parameters of a model, biases and norms included, without compiling its init."""
    boxed = jax.eval_shape(ARTransformer(cfg).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return boxed, jax.tree.map(lambda x: rng.normal(0.0, 0.25, x.shape).astype(np.float32), meta.unbox(boxed))


def params_of(golden, prefix: str = "w/"):
    """Linen parameters (or gradients) of a reference's torch tensors, through the name table."""
    tensors = {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)}
    return to_params(tensors, table(CFG), _wanted())


def assert_trees_close(got, expected, rtol=1e-4):
    """Every leaf within rtol of the expected leaf's largest entry."""
    got, expected = flatten(got), flatten(expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=rtol * max(1e-3, np.abs(value).max()), err_msg=name)


def compare_mixed(golden, cfg: ARConfig = CFG):
    """Hidden states, both heads and every parameter's gradient of a mixed sequence."""
    model, params = ARTransformer(cfg), params_of(golden)

    def loss(params):
        hidden = model.apply({"params": params}, golden["in/ids"])
        text = model.apply({"params": params}, hidden, method="text_logits")
        image = model.apply({"params": params}, hidden, method="image_logits")
        return jnp.sum(text * golden["in/text_cotangent"]) + jnp.sum(image * golden["in/image_cotangent"]), (hidden, text, image)

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    for name, value in zip(("hidden", "text_logits", "image_logits"), out):
        np.testing.assert_allclose(value, golden[f"out/{name}"], rtol=1e-4, atol=1e-4, err_msg=name)
    assert_trees_close(grads, params_of(golden, "grad/"))


def compare_plain(golden):
    """A text-only sequence is a plain Qwen2 of the language layers: logits and gradients; the other parameters get exactly none."""
    model = ARTransformer(CFG)

    def loss(params):
        hidden = model.apply({"params": params}, golden["in/text_ids"])
        logits = model.apply({"params": params}, hidden, method="text_logits")
        return jnp.sum(logits * golden["in/plain_cotangent"]), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params_of(golden))
    np.testing.assert_allclose(logits, golden["out/plain_logits"], rtol=1e-4, atol=1e-4)
    for key, grad in to_tensors(grads, table(CFG)).items():
        expected = golden.get(f"plain/{key}", np.zeros_like(grad))
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=key)


@functools.cache
def golden():
    return dict(np.load(GOLDEN))


@functools.cache
def hidden_of(cfg: ARConfig = CFG):
    return jax.jit(lambda params, *args: ARTransformer(cfg).apply({"params": params}, *args))


def test_golden_outputs_and_gradients():
    # Recomputation and chunked attention on: neither may change a number. The text-only test runs with both off.
    compare_mixed(golden(), dataclasses.replace(CFG, remat="full", attention_chunk=4, unroll=2))


def test_golden_text_is_plain_qwen2():
    compare_plain(golden())


def test_name_table_round_trip():
    params = params_of(golden())
    back = to_tensors(params, table(CFG))
    for key, value in back.items():
        np.testing.assert_array_equal(value, golden()[f"w/{key}"])


def _noise(params, stack):
    return params | {stack: jax.tree.map(lambda x: x + 0.5, params[stack])}


def test_vision_output_is_discarded_at_text():
    params, image = params_of(golden()), IDS >= CFG.vocab_size
    before = np.asarray(hidden_of()(params, IDS))
    # The last stack is all vision: whatever it computes at a text token, the hidden state there stays bit for bit.
    after = np.asarray(hidden_of()(_noise(params, "heads"), IDS))
    np.testing.assert_array_equal(after[~image], before[~image])
    assert np.abs(after[image] - before[image]).min(axis=-1).max() > 1e-3
    # The first stack reaches text only through image tokens it changed: text before the first one stays, text after it moves.
    after = np.asarray(hidden_of()(_noise(params, "adapters"), IDS))
    np.testing.assert_array_equal(after[0, :3], before[0, :3])
    assert np.abs(after[0, 7:] - before[0, 7:]).max() > 1e-3


def test_packed_segments_equal_separate_sequences():
    params = params_of(golden())
    packed = np.array([[*IDS[0], *IDS[1, :7], 0, 0]], np.int32)
    segments = np.array([[1] * 10 + [2] * 7 + [0] * 2], np.int32)
    positions = np.array([[*range(10), *range(7), 0, 0]], np.int32)
    got = hidden_of()(params, packed, positions, segments)
    assert np.isfinite(got).all()
    apart = hidden_of()(params, IDS)  # causal: the second one's first seven tokens do not see the rest
    np.testing.assert_allclose(got[0, :10], apart[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0, 10:17], apart[1, :7], rtol=1e-5, atol=1e-5)
    # Chunked attention keeps the segments, its own padding included.
    chunked = hidden_of(dataclasses.replace(CFG, attention_chunk=4))(params, packed, positions, segments)
    np.testing.assert_allclose(chunked[:, :17], got[:, :17], rtol=1e-5, atol=1e-5)


def test_mesh_gives_the_same_numbers():
    cfg = dataclasses.replace(
        CFG, vocab_size=24, mm_vocab_size=20, image_vocab_size=14, n_adapter_layers=0, n_language_layers=1, n_head_layers=1
    )
    model, ids = ARTransformer(cfg), np.concatenate([IDS, IDS[:, ::-1]])
    boxed, params = random_params(cfg)

    def loss(params, ids):
        hidden = model.apply({"params": params}, ids)
        return sum(jnp.sum(head_logp(model, params, which, hidden, ids, chunk)[0]) for which, chunk in (("text", 5), ("image", 0)))

    alone = jax.jit(jax.value_and_grad(loss))(params, ids)
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    shardings = param_shardings(boxed, mesh)
    with jax.set_mesh(mesh):
        spread = jax.jit(jax.value_and_grad(loss), in_shardings=(shardings, None))(jax.device_put(params, shardings), ids)
    np.testing.assert_allclose(spread[0], alone[0], rtol=2e-5)
    assert_trees_close(spread[1], alone[1])
    kernel = shardings["language"]["attn"]["q_proj"]["kernel"]
    assert kernel.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor", None)), 4)


def test_chunked_logp_equals_direct():
    model, params = ARTransformer(CFG), params_of(golden())
    hidden = hidden_of()(params, IDS)
    positions = np.array([[2, 5, 0, 9, 1], [3, 3, 8, 7, 6]])
    targets = np.array([[1, 12, 3, 0, 5], [9, 2, 2, 11, 7]])

    def total(hidden, params, which, chunked):
        picked = select(hidden, positions)
        if chunked:
            return sum(jnp.sum(x * (i + 1)) for i, x in enumerate(head_logp(model, params, which, picked, targets, chunk=2)))
        logp = jax.nn.log_softmax(model.apply({"params": params}, picked, method=f"{which}_logits"))
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)) + 2 * jnp.sum(entropy)

    for which in ("text", "image"):
        expected = jax.value_and_grad(total, argnums=(0, 1))(hidden, params, which, False)
        got = jax.value_and_grad(total, argnums=(0, 1))(hidden, params, which, True)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_init_makes_every_parameter_and_presets_are_the_released_sizes():
    assert {p.split("/")[0] for p in _wanted()} == {
        "adapters", "language", "heads", "lm_embed", "mm_embed", "lm_norm", "mm_norm", "lm_head", "mm_head"
    }  # fmt: skip
    big = ARTransformer(PRESETS["xomni-7b"])
    shapes = jax.eval_shape(big.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(meta.unbox(shapes))) == 9_597_981_696
    assert PRESETS["xomni-7b"].n_layers == 36


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_heads=5), "n_heads=5 is not a multiple of n_kv_heads=2"),
        (dict(head_dim=3), "head_dim=3: rotary positions need pairs; make it even"),
        (dict(head_dim=6, grid_columns=4), "head_dim=6: rotary positions need two pairs"),
        (dict(image_vocab_size=99), "image_vocab_size=99 exceeds mm_vocab_size=19"),
        (dict(remat="some"), "remat='some' is unknown"),
        (dict(unroll=0), "unroll=0 is not a number of layers"),
        (dict(n_language_layers=0), "n_language_layers >= 1"),
        (dict(attention_chunk=-1), "attention_chunk=-1 is negative"),
    ],
)
def test_config_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)
