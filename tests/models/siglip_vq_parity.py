"""Comparison of the tokenizer with a reference's weights, outputs and gradients; used with stored and with fresh ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from tests.name_tables import to_params
from xomni_jax.checkpoint.conversion import flatten
from xomni_jax.checkpoint.names.siglip_vq import table
from xomni_jax.models.siglip_vq import SigLIPVQ, SigLIPVQConfig

SIZES = dict(width=24, layers=2, heads=3, mlp=40, patch=4, pos_grid=5, codebook_size=19, code_width=10, conv_blocks=2, groups=4)
QUANTIZER_WEIGHT = 0.7


def config(**changes) -> SigLIPVQConfig:
    """The sizes of the reference."""
    return SigLIPVQConfig(**SIZES | changes)


def shapes(cfg: SigLIPVQConfig) -> dict[str, tuple[int, ...]]:
    """{parameter path: shape} of the model."""
    pixels = jax.ShapeDtypeStruct((1, cfg.patch, cfg.patch, 3), jnp.float32)
    tree = jax.eval_shape(lambda x: SigLIPVQ(cfg).init(jax.random.key(0), x), pixels)["params"]
    return {path: leaf.shape for path, leaf in flatten(meta.unbox(tree)).items()}


def part(data, prefix: str) -> dict[str, np.ndarray]:
    """Entries below a prefix, without it."""
    return {key.removeprefix(prefix): data[key] for key in data if key.startswith(prefix)}


def params_of(data, cfg: SigLIPVQConfig, prefix: str = "w/"):
    """Weights (or gradients) converted by the released names."""
    return to_params(part(data, prefix), table(cfg), shapes(cfg))


def compare(data, **changes) -> None:
    """Codes equal; outputs and losses to 1e-4, gradients to 1e-4 of each tensor's largest entry."""
    cfg = config(**changes)
    model, params, x = SigLIPVQ(cfg), params_of(data, cfg), part(data, "in/")
    want = part(data, "out/")
    close = dict(rtol=1e-4, atol=1e-4)

    def scalar(params):
        out = model.apply({"params": params}, x["pixels"], skip_B=jnp.asarray(x["skip"]))
        return jnp.sum(out["semantics"] * x["cotangent"]) + QUANTIZER_WEIGHT * out["losses"]["quantizer"], out

    (_, out), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    np.testing.assert_array_equal(out["codes"], want["codes"])
    np.testing.assert_allclose(out["semantics"], want["semantics"], **close)
    losses = [out["losses"][name] for name in ("straight_through", "commitment", "codebook", "quantizer")]
    np.testing.assert_allclose(losses, want["losses"], rtol=1e-5)
    for name in ("pixels", "tall"):
        features = jax.jit(lambda p, v: model.apply({"params": p}, v, method="features"))(params, x[name])
        np.testing.assert_allclose(features, want["features" if name == "pixels" else name], **close)
    from_codes = model.apply({"params": params}, jnp.asarray(want["codes"]), method="semantics")
    np.testing.assert_allclose(from_codes, want["from_codes"], **close)

    expected = flatten(params_of(data, cfg, "grad/"))
    for path, ours in flatten(grads).items():
        size = float(np.max(np.abs(expected[path])))
        assert size > 0, f"{path}: the reference has no gradient, nothing is compared"
        np.testing.assert_allclose(ours, expected[path], rtol=1e-4, atol=1e-4 * size, err_msg=path)
