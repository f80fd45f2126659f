"""Published code run on small random weights, kept outside the repository: XOMNI_ORACLES names the folder.

Each oracle is a folder with model.safetensors (the keys of the published checkpoint) and expected.npz (inputs and outputs in
PyTorch's layout). Without the variable these tests are skipped; the goldens cover the same from torch modules of this repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import golden
from tests.models.llamagen_parity import compare_c2i, inputs
from xomni_jax.checkpoint.component_source import NewParts
from xomni_jax.checkpoint.conversion import unflatten
from xomni_jax.checkpoint.released_files import open_file
from xomni_jax.models.registry import COMPONENTS

pytestmark = pytest.mark.skipif("XOMNI_ORACLES" not in os.environ, reason="XOMNI_ORACLES names no folder of oracles")


def opened(name: str, parts: NewParts = NewParts(), **fields):
    """(module, parameters as a conversion gives them, expected arrays) of an oracle; `fields` change the config."""
    folder = Path(os.environ["XOMNI_ORACLES"]) / name
    ((component, read),) = open_file(folder / "model.safetensors", parts).items()
    source = read(**fields)
    readers, wrong = source.readers()
    assert not wrong
    with np.load(folder / "expected.npz") as file:
        return COMPONENTS[component].module(source.config), unflatten({r.path: r.read() for r in readers}), dict(file)


def last(x: np.ndarray) -> np.ndarray:
    """Channels from the second axis to the last."""
    return np.moveaxis(x, 1, -1)


def test_llamagen_vq():
    model, params, want = opened("llamagen_vq", entropy_weight=0.1)
    pixels = last(want["image"])
    run = lambda method, x: jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)  # noqa: E731
    golden.assert_close(run(lambda m, x: m.encoder(x), pixels), last(want["encoder_out"]), "encoder")
    golden.assert_close(run(lambda m, x: m.quant_conv(m.encoder(x)), pixels), last(want["quant_conv_out"]), "quant_conv")
    np.testing.assert_array_equal(run("encode", pixels), want["indices"])
    golden.assert_close(run("semantics", want["indices"]), last(want["quantized"]), "rows")
    golden.assert_close(run("decode", want["indices"]), last(want["reconstruction"]), "reconstruction")
    golden.assert_close(run("decode", want["random_indices"]), last(want["reconstruction_random_indices"]), "random codes")

    def loss(p):
        out = model.apply({"params": p}, pixels)
        return jnp.mean(out["pixels"] ** 2) + out["losses"]["quantizer"], out["losses"]

    (_, losses), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for name, key, factor in (("codebook", "vq", 1), ("commitment", "commit", 0.25), ("entropy", "entropy", 0.1)):
        golden.assert_close(factor * losses[name], want[f"train.{key}_loss"], name, 1e-3)
    golden.assert_close(gradients["codebook"], want["train.grad.embedding"], "codebook gradient", 1e-3)
    kernel = gradients["quant_conv"]["kernel"].T[:, :, None, None]
    golden.assert_close(kernel, want["train.grad.quant_conv.weight"], "quant_conv gradient", 1e-3)
    kernel = gradients["encoder"]["conv_in"]["kernel"].transpose(3, 2, 0, 1)
    golden.assert_close(kernel, want["train.grad.encoder.conv_in.weight"], "conv_in gradient", 1e-3)
    params["encoder"]["conv_in"] = {name: 0.003 * x for name, x in params["encoder"]["conv_in"].items()}  # shows a wrong epsilon
    golden.assert_close(run(lambda m, x: m.encoder(x), pixels), last(want["eps_probe.encoder_out"]), "epsilon", 1e-3)


def test_llamagen_c2i():
    model, params, want = opened("llamagen_c2i", NewParts(heads=5, columns=5))
    compare_c2i(model, params, want)
    head = jax.jit(lambda p, ids: model.apply({"params": p}, model.apply({"params": p}, ids), method="image_logits"))
    for name in ("mm_embed", "lm_embed"):
        params[name] = {"table": 0.01 * params[name]["table"]}
    golden.assert_close(head(params, inputs(model, want)), want["eps_probe.logits_cond"], "epsilon", 1e-3)


@pytest.mark.parametrize("name", ["omnitokenizer_vq", "omnitokenizer_vq_rel", "omnitokenizer_vae"])
def test_omnitokenizer(name):
    """The path of torch from 2.1 on, for which the released weights are; images and clips, both ways."""
    model, params, want = opened(name)
    run = lambda method, *x: jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=method))(params, *x)  # noqa: E731
    for kind in ("image", "video"):
        pixels = last(want["video"][:, :, :1] if kind == "image" else want["video"])
        out = {key.split(".", 2)[2]: last(value) for key, value in want.items() if key.startswith(f"sdpa.{kind}.") and value.ndim > 3}
        golden.assert_close(run("features", pixels), out["encoder_out"], f"{kind}: encoder")
        if model.cfg.kind == "kl":
            mean, logvar = run("moments", pixels)
            golden.assert_close(mean, out["mean"], f"{kind}: mean")
            golden.assert_close(logvar, out["logvar_clamped"], f"{kind}: log-variance")
            made, pixels_out = run("decode_latents", out["mean"]), out["reconstruction_of_mean"]
        else:
            codes = want[f"sdpa.{kind}.indices"]
            golden.assert_close(run("outputs", pixels), out["pre_vq_normalized"], f"{kind}: z")
            np.testing.assert_array_equal(run("encode", pixels), codes)
            golden.assert_close(run("semantics", codes), out["quantized"], f"{kind}: rows")
            made, pixels_out = run("decode", codes), out["reconstruction_from_indices"]
        golden.assert_close(made, pixels_out if pixels_out.ndim == 5 else pixels_out[:, None], f"{kind}: pixels")
    golden.assert_close(run("features", last(0.01 * want["video"][:, :, :1])), last(want["eps_probe.encoder_out"]), "epsilon", 1e-3)
