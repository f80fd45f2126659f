"""SigLIP-VQ: parity with stored torch outputs, names, skipping, encode / semantics, meshes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests.models.siglip_vq_parity import compare, config, params_of, part, shapes
from tests.name_tables import to_params, to_tensors
from xomni_jax.checkpoint.conversion import ConversionError, flatten
from xomni_jax.checkpoint.names.siglip_vq import projector_table, table, vit_table
from xomni_jax.models.siglip_vq import PRESETS, SigLIPVQ, SigLIPVQConfig
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

GOLDEN = Path(__file__).parents[1] / "goldens" / "siglip_vq.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def params(golden):
    return params_of(golden, config())


@pytest.mark.parametrize("changes", [{}, {"query_chunk": 8, "remat": "full"}])
def test_outputs_and_gradients_equal_torch(golden, changes):
    """Codes, features, semantics, losses and every gradient; the same with blocked attention and recomputation."""
    compare(golden, **changes)


# ------------------------------------------------------------------------------------------------ names


def test_names_round_trip_and_drop_what_is_unused(golden, params):
    cfg, weights = config(), part(golden, "w/")
    back = to_tensors(params, table(cfg))
    assert set(back) == set(weights)
    for key, value in weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    more = {f"vit.{key}": np.zeros(2) for key in ("norm.weight", "norm.bias", "attn_pool.kv.weight", "head.weight")}
    to_params(weights | more, table(cfg), shapes(cfg))
    with pytest.raises(ConversionError, match="vqproj.norm.weight: in the checkpoint, no rule takes it"):
        to_params(weights | {"vqproj.norm.weight": np.zeros(2)}, table(cfg), shapes(cfg))


@pytest.mark.parametrize("preset", ["siglip2-g-xomni", "siglip-so400m-xomni"])
def test_released_files_have_the_released_names(preset):
    cfg = PRESETS[preset]
    vit, projector = ({rule.source for rule in make(cfg).rules} for make in (vit_table, projector_table))
    assert {"pos_embed", "patch_embed.proj.weight", f"blocks.{cfg.layers - 1}.attn.qkv.bias", "blocks.0.mlp.fc2.weight"} <= vit
    assert len(vit) == 3 + 12 * cfg.layers
    assert {"quant_conv.weight", "quantize.embedding.weight", "post_quant_conv.bias", "post_conv.1.conv2.weight"} <= projector
    assert len(projector) == 5 + 8 * 2
    wanted = shapes(cfg)
    assert {rule.target for rule in table(cfg).rules} == set(wanted)
    assert wanted["codebook"] == (16384, 2048) and wanted["vit/pos_embed"] == (128, 128, cfg.width)


# ------------------------------------------------------------------------------------------------ behaviour


def test_encode_is_the_training_forwards_codes_and_semantics_its_output(golden, params):
    """Raw rows are what training forwards as well: encode then semantics equals the unskipped training output."""
    model, pixels = SigLIPVQ(config()), golden["in/pixels"]
    codes = model.apply({"params": params}, pixels, method="encode")
    assert codes.dtype == jnp.int32 and codes.shape == (3, 3, 7)
    np.testing.assert_array_equal(codes, golden["out/codes"])
    semantics = model.apply({"params": params}, codes, method="semantics")
    out = model.apply({"params": params}, pixels)
    np.testing.assert_allclose(semantics, out["semantics"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out["codes"], codes)
    np.testing.assert_allclose(out["usage"], np.bincount(np.ravel(codes), minlength=19) / codes.size, rtol=1e-6)


def test_all_skipped_is_continuous_and_ignores_the_codebook(golden, params):
    model, pixels = SigLIPVQ(config()), golden["in/pixels"]

    def total(params):
        return jnp.sum(model.apply({"params": params}, pixels, jnp.ones(len(pixels), bool))["semantics"] ** 2)

    grads = jax.jit(jax.grad(total))(params)
    assert not np.any(grads["codebook"]) and np.any(grads["quant_conv"]["kernel"]) and np.any(grads["vit"]["pos_embed"])


def test_errors_name_the_culprit(golden, params):
    model, pixels = SigLIPVQ(config()), golden["in/pixels"]
    with pytest.raises(ValueError, match="11 x 28 pixels does not divide into patches of 4"):
        model.apply({"params": params}, pixels[:, :11], method="encode")
    with pytest.raises(ValueError, match="width=25 does not divide into heads=3"):
        config(width=25)
    with pytest.raises(ValueError, match="width=24 does not divide into groups=7"):
        config(groups=7)
    with pytest.raises(ValueError, match="skip_probability=1.5 is not a probability"):
        config(skip_probability=1.5)
    with pytest.raises(ValueError, match="SigLIPVQConfig.remat='some' is unknown"):
        config(remat="some")


def test_bfloat16_keeps_the_search_in_float32(golden, params):
    """Outputs z are float32 whatever the ViT computes in, and most codes stay."""
    model = SigLIPVQ(config(dtype=jnp.bfloat16))
    z = model.apply({"params": params}, golden["in/pixels"], method="outputs")
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1.0, rtol=1e-5)
    codes = model.apply({"params": params}, golden["in/pixels"], method="encode")
    assert np.mean(np.asarray(codes) == golden["out/codes"]) > 0.9
    assert model.apply({"params": params}, codes, method="semantics").dtype == jnp.bfloat16


def test_mesh_does_not_change_the_step():
    """fsdp=4, tensor=2: parameters split as the table says, loss and gradients as on one device."""
    cfg = SigLIPVQConfig(width=24, layers=2, heads=2, mlp=40, patch=4, pos_grid=5, codebook_size=22, code_width=7, conv_blocks=1, groups=4)
    model = SigLIPVQ(cfg)
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 3)).astype(np.float32)
    skip = jnp.array([False, True, False, False])
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels)["params"])
    params = meta.unbox(jax.jit(lambda: model.init(jax.random.key(0), pixels)["params"])())

    def loss(params, pixels):
        out = model.apply({"params": params}, pixels, skip_B=skip)
        return jnp.mean(out["semantics"] ** 2) + out["losses"]["quantizer"]

    step = jax.value_and_grad(loss)
    alone, alone_grads = jax.jit(step)(params, pixels)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = param_shardings(boxed, mesh)
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, in_shardings=(shardings, None), out_shardings=(None, shardings))
        spread, spread_grads = sharded(params, pixels)
    np.testing.assert_allclose(spread, alone, rtol=2e-5)
    assert "tensor" in str(shardings["codebook"].spec) and "fsdp" in str(shardings["vit"]["blocks"]["qkv"]["kernel"].spec)
    want, split = flatten(alone_grads), flatten(shardings)
    for path, grad in flatten(spread_grads).items():
        assert grad.sharding.is_equivalent_to(split[path], grad.ndim), path
        np.testing.assert_allclose(grad, want[path], rtol=1e-4, atol=1e-4 * float(np.max(np.abs(want[path]))), err_msg=path)
