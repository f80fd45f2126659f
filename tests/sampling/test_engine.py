"""Trajectories of segments: against a plain pass over each row, on kernels and meshes, in several calls."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.trajectories import (
    BOXED,
    CFG,
    IMAGE,
    NEGATIVE,
    PARAMS,
    SAMPLE_GAP,
    SCORE_GAP,
    STOPS,
    P,
    R,
    V,
    check,
    draw,
    random_rows,
)  # fmt: skip
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, SegmentSpec
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

FREE = SamplingConfig(top_k=0, min_p=0.0)
PREFIX = Segment(np.broadcast_to(np.array([V + 14, 5, IMAGE], np.int32), (P, R, 3)))
WORDS = Segment(np.arange(P * R * 4, dtype=np.int32).reshape(P, R, 4) % V, np.arange(P * R, dtype=np.int32).reshape(P, R) % 5)
# A thought, an image, a judge's words of unequal length, and a second image.
REDRAWN = [
    SegmentSpec("thought", "text", 5, SamplingConfig(temperature=0.8, top_k=0, min_p=0.0), STOPS),
    SegmentSpec("first", "image", 4, SamplingConfig(temperature=1.3, top_k=8, top_p=0.9, min_p=0.02, guidance=1.8)),
    WORDS,
    PREFIX,
    SegmentSpec("second", "image", 3, dataclasses.replace(FREE, guidance=1.8)),
]

RAGGED = [REDRAWN[0], WORDS, REDRAWN[4]]


@pytest.mark.parametrize("plan", [REDRAWN, None, None], ids=["redrawn", "random", "another"])
def test_trajectories_equal_a_plain_pass(plan, request):
    """200 of them: python -m tests.sampling.trajectories."""
    gaps = check(["redrawn", "random", "another"].index(request.node.callspec.id), plan)
    assert max(gaps.logp, gaps.entropy) < SCORE_GAP and gaps.sample < SAMPLE_GAP and gaps.tokens == 0


def drawn(plan, cfg=CFG, params=PARAMS, negative=NEGATIVE, rows=slice(None)):
    """The segments of a plan for some prompts."""
    ids, lengths, keys = random_rows(np.random.default_rng(7))
    plan = [s if isinstance(s, SegmentSpec) else jax.tree.map(lambda x: x[rows], s) for s in plan]
    return jax.jit(lambda p: draw(Engine(ARTransformer(cfg)), p, plan, ids[rows], lengths[rows], keys[rows], negative))(params)


@pytest.fixture(scope="module")
def ragged():
    """RAGGED on one device."""
    return drawn(RAGGED)


def assert_same(got, expected):
    """The same tokens, with log-probs that differ by rounding."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.counts, b.counts)
        if b.logp is not None:
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-4)


def test_a_row_depends_on_no_other(ragged):
    assert len(set(np.asarray(ragged[0].lengths).ravel().tolist())) > 1
    assert_same(drawn(RAGGED, rows=slice(2, 3)), jax.tree.map(lambda x: x[2:3], ragged))


def test_meshes_and_kernels_draw_the_same(ragged):
    """Rows of unequal length, on the TPU kernel, interpreted; attention of a given segment in chunks."""
    mesh = make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])
    cfg = dataclasses.replace(CFG, attention="splash", attention_chunk=2)
    with jax.set_mesh(mesh):
        assert_same(drawn(RAGGED, cfg, jax.device_put(PARAMS, param_shardings(BOXED, mesh))), ragged)


def test_guidance_needs_negative_prompts():
    with pytest.raises(ValueError, match="segment 'second' has guidance=1.8, for which `start` needs negative prompts"):
        drawn(RAGGED[2:], negative=None)


@pytest.mark.parametrize(
    "fields, message",
    [
        (("a", "sound", 3), "kind='sound' is unknown"),
        (("a", "text", 0), "segment 'a' has length=0"),
        (("a", "image", 3, FREE, (1,)), "segment 'a' is an image, which has a fixed number of codes"),
    ],
)
def test_specs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        SegmentSpec(*fields)


def test_score_is_differentiable_and_keeps_no_logits():
    """The gradient of a chunked score is that of whole logits, and no array has the logits of more positions than a chunk's."""
    cfg = dataclasses.replace(CFG, n_adapter_layers=0, n_head_layers=0, image_vocab_size=13)
    engine, (ids, lengths, _) = Engine(ARTransformer(cfg)), random_rows(np.random.default_rng(2))
    text = Segment(np.full((P, 6), 4), np.array([6, 1, 0, 3]), spec=SegmentSpec("text", "text", 6, FREE))
    image = Segment(np.arange(P * 6).reshape(P, 6) % 13, kind="image", spec=SegmentSpec("image", "image", 6, FREE))
    params = {k: v for k, v in PARAMS.items() if k not in ("adapters", "heads")}

    def total(params, chunk):
        scores = engine.score(params, (ids, lengths), (text, image), chunk=chunk)
        return sum(jnp.sum(jnp.where(s.mask, logp + 0.5 * entropy, 0)) for s, (logp, entropy) in zip((text, image), scores))

    chunked, whole = (jax.jit(jax.grad(total), static_argnums=1)(params, chunk) for chunk in (2, 0))
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
    assert all(np.abs(chunked[name]["kernel"]).max() > 0 for name in ("lm_head", "mm_head"))

    def logits(chunk):
        """Most values of an array over a vocabulary that is no parameter."""
        module = jax.jit(jax.grad(total), static_argnums=1).lower(params, chunk).as_text()

        sizes = [[int(n) for n in dims.split("x")] for dims in re.findall(r"tensor<([\dx]+)xf32>", module)]
        return max(int(np.prod(s)) for s in sizes if s[-1] in (V, 13) and s[:-1] != [cfg.d_model])

    assert logits(2) == P * 2 * V < logits(0) == P * 6 * V
