"""LlamaGen's tokenizer: parity with a torch module of the published layout, sizes, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import name_tables
from tests.models import golden
from tests.parity.reference_llamagen_vq import SIZES
from xomni_jax.checkpoint.names.llamagen_vq import table
from xomni_jax.models.llamagen_vq import PRESETS, LlamaGenVQ, LlamaGenVQConfig

CFG = LlamaGenVQConfig(**SIZES)


def compare(arrays: dict[str, np.ndarray], cfg: LlamaGenVQConfig = CFG) -> None:
    """Codes equal; outputs and losses to 1e-4, gradients to 1e-3 of the largest value: the entropy's softmax has temperature 0.01."""
    model, pixels, want = LlamaGenVQ(cfg), arrays["in/pixels"], golden.part(arrays, "out")
    shapes = golden.shapes(model, pixels)
    params = name_tables.to_params(golden.part(arrays, "w"), table(cfg), shapes)

    def loss(params):
        out = model.apply({"params": params}, pixels)
        return jnp.mean(out["pixels"] ** 2) + out["losses"]["quantizer"], out

    @jax.jit
    def run(params, pixels, codes):
        bound = model.bind({"params": params})
        return bound.encode(pixels), bound.semantics(codes), bound.decode(codes), jax.value_and_grad(loss, has_aux=True)(params)

    codes, rows, decoded, ((_, out), gradients) = run(params, pixels, want["codes"])
    for got in (codes, out["codes"]):
        np.testing.assert_array_equal(got, want["codes"])
    golden.assert_close(out["z"], want["z"], "z")
    golden.assert_close(rows, want["rows"], "rows")
    golden.assert_close(decoded, want["pixels"], "pixels of codes")
    golden.assert_close(out["pixels"], want["pixels"], "pixels")
    for name, value in golden.part(arrays, "loss").items():
        golden.assert_close(out["losses"][name], value, name)
    zero = ("k_proj/bias",)  # a key bias under softmax
    golden.assert_gradients(gradients, golden.part(arrays, "grad"), table(cfg), shapes, zero=zero, tolerance=1e-3)


def test_golden():
    compare(golden.load("llamagen_vq"))


@pytest.mark.parametrize("name, count", [("vq-16", 71_883_403), ("vq-8", 70_109_835)])
def test_presets_have_the_published_layout(name, count):
    cfg = PRESETS[name]
    wanted = golden.shapes(LlamaGenVQ(cfg), jnp.zeros((1, 2 * cfg.patch, cfg.patch, 3)))
    assert name_tables.plan(name_tables.stand_ins(table(cfg), wanted), table(cfg), wanted)
    assert (cfg.patch, sum(np.prod(s) for s in wanted.values())) == (int(name[3:]), count)


def test_refusals():
    with pytest.raises(ValueError, match="a width of 14 does not divide into groups=3"):
        LlamaGenVQConfig(in_features=6, block_channels=(6, 14), groups=3)
    with pytest.raises(ValueError, match="image of 6 x 9 pixels does not divide into patches of 2"):
        LlamaGenVQ(CFG).init(jax.random.key(0), jnp.zeros((1, 6, 9, 3)))
