"""Cached decoding against the full forward, sampling against its replay."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transformer import CFG as BASE
from tests.models.test_transformer import random_params
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sampling.cache import GeneratedCache, extend, prefill
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.generate import generate_codes, generate_text
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Segment, append, image_spec
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings

CFG = dataclasses.replace(BASE, vocab_size=24, mm_vocab_size=20, image_vocab_size=14, n_language_layers=2, n_head_layers=1)
MODEL, V = ARTransformer(CFG), CFG.vocab_size
BOXED, PARAMS = random_params(CFG)
# Prompts of 4, 7 and 2 tokens, the second with an image in it; V + 15 stands for <IMAGE>.
IDS = np.array([[1, 5, 9, V + 15, 0, 0, 0], [3, V + 1, V + 2, V + 9, 6, 11, V + 15], [2, V + 15, 9, 9, 9, 9, 9]], np.int32)
LENGTHS = np.array([4, 7, 2], np.int32)
NEGATIVE = np.array([[8, 2, V + 15]], np.int32), np.array([3], np.int32)
FREE = SamplingConfig(top_k=0, min_p=0.0)


@functools.cache
def full():
    return jax.jit(lambda ids: MODEL.apply({"params": PARAMS}, ids))


@functools.partial(jax.jit, static_argnames=("n_codes", "sampling", "return_mask"))
def generate(params, ids, lengths, keys, n_codes, sampling, negative=None, return_mask=False):
    return generate_codes(MODEL, params, ids, lengths, n_codes, keys, sampling, negative, return_mask)


def rows_with(codes, offset=V):
    """The prompts with codes behind them; those of `full`."""
    return append(IDS, LENGTHS, Segment(codes, kind="image"), offset)[0]


def replay(model, params, ids, lengths, codes, sampling, packed=None, negative=None, chunk=2):
    """Log-prob and entropy of codes."""
    image = Segment(codes, None, None, packed, "image", image_spec(codes.shape[1], sampling))
    return Engine(model).score(params, (ids, lengths), (image,), negative, chunk)[0]


def keys_of(prompts: int, rollouts: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), (prompts, rollouts))


def test_cached_decoding_equals_the_full_forward():
    P, R, T = 3, 2, 5
    tokens = np.random.default_rng(1).integers(0, CFG.image_vocab_size, (P, R, T)) + V
    tokens[:, 1, 3] = 7  # a text token among codes, in one rollout only
    start_PD, prompt = jax.jit(lambda ids, n: prefill(MODEL, PARAMS, ids, n))(IDS, LENGTHS)
    step = jax.jit(lambda ids, prompt, cache: extend(MODEL, PARAMS, ids, prompt, cache))
    cache, steps = GeneratedCache.empty(CFG, P, R, T), []
    for t in range(T):
        hidden_P1RD, cache = step(tokens[:, None, :, t], prompt, cache)
        steps.append(hidden_P1RD[:, 0])
    for r in range(R):
        expected = full()(rows_with(tokens[:, r], 0))
        rows = np.arange(P)
        np.testing.assert_allclose(start_PD, expected[rows, LENGTHS - 1], rtol=1e-4, atol=1e-4)
        for t in range(T):
            np.testing.assert_allclose(steps[t][:, r], expected[rows, LENGTHS + t], rtol=1e-4, atol=1e-4)


def test_the_kernels_decode_the_same():
    """Prefill and decode steps on the TPU kernels, interpreted, on a mesh."""
    ids, lengths, keys = IDS[:2], LENGTHS[:2], keys_of(2, 2)
    expected = generate(PARAMS, ids, lengths, keys, 3, FREE)
    model = ARTransformer(dataclasses.replace(CFG, attention="splash"))
    with jax.set_mesh(make_mesh(dict(data=2), jax.devices()[:2])):
        got = jax.jit(lambda p: generate_codes(model, p, ids, lengths, 3, keys, FREE))(PARAMS)
    np.testing.assert_array_equal(got["codes"], expected["codes"])
    np.testing.assert_allclose(got["logp"], expected["logp"], atol=1e-4)


def test_codes_drawn_in_segments_are_the_same_bit_for_bit():
    keys, sampling = keys_of(3, 2), SamplingConfig(top_k=6, guidance=2.5)
    whole = generate(PARAMS, IDS, LENGTHS, keys, 6, sampling, NEGATIVE, True)
    sampler = Sampler.make(MODEL, (2, 3), sampling, most=2, return_mask=True)
    jax.tree.map(np.testing.assert_array_equal, sampler(PARAMS, IDS, LENGTHS, keys, NEGATIVE), whole)
    assert sampler.segments == 3


def test_segments_follow_the_prompt_at_once():
    ids, lengths, tokens = jnp.array([[5, 6, 9], [7, 9, 9]]), jnp.array([2, 1]), jnp.array([[0, 3], [1, 2]])
    rows = append(ids, lengths, Segment(tokens, kind="image"), 10)
    assert rows[0].tolist() == [[5, 6, 10, 13, 0], [7, 11, 12, 0, 0]] and rows[1].tolist() == [4, 3]
    rows = append(*rows, Segment(tokens + 1, jnp.array([0, 1])), 10)
    assert rows[0].tolist() == [[5, 6, 10, 13, 0, 0, 0], [7, 11, 12, 2, 0, 0, 0]] and rows[1].tolist() == [4, 4]


def test_a_rollout_does_not_depend_on_its_group_or_batch():
    keys = keys_of(3, 2)
    group = generate(PARAMS, IDS, LENGTHS, keys, 5, FREE)
    assert group["codes"].shape == (3, 2, 5) and group["codes"].dtype == jnp.int32 and group["sampling_mask"] is None
    assert len({tuple(c) for c in group["codes"].reshape(6, 5).tolist()}) > 1
    for p, r in ((0, 1), (1, 0), (2, 1)):
        alone = generate(PARAMS, IDS[p : p + 1], LENGTHS[p : p + 1], keys[p : p + 1, r : r + 1], 5, FREE)
        np.testing.assert_array_equal(alone["codes"][0, 0], group["codes"][p, r])
        np.testing.assert_allclose(alone["logp"][0, 0], group["logp"][p, r], atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        FREE,
        SamplingConfig(temperature=0.7, top_k=6, top_p=0.9, min_p=0.05),
        SamplingConfig(temperature=1.3, top_k=8, min_p=0.02, guidance=2.5),
    ],
    ids=["free", "truncated", "guided"],
)
def test_replay_equals_the_sampler(sampling):
    P, R, T = 3, 2, 5
    negative = NEGATIVE if sampling.guided else None
    out = generate(PARAMS, IDS, LENGTHS, keys_of(P, R), T, sampling, negative, sampling.truncates)
    codes, packed = out["codes"].reshape(P * R, T), out["sampling_mask"]
    if packed is not None:
        assert packed.shape == (P, R, T, 2) and packed.dtype == jnp.uint8
        mask = jnp.unpackbits(packed, axis=-1, count=CFG.image_vocab_size).astype(bool)
        assert bool(jnp.all(jnp.take_along_axis(mask, out["codes"][..., None], -1))) and not bool(jnp.all(mask))
        packed = packed.reshape(P * R, T, 2)
    ids, lengths = np.repeat(IDS, R, axis=0), np.repeat(LENGTHS, R)
    logp, entropy = jax.jit(lambda params: replay(MODEL, params, ids, lengths, codes, sampling, packed, negative))(PARAMS)
    np.testing.assert_allclose(logp, out["logp"].reshape(P * R, T), atol=1e-4)
    assert entropy.shape == (P * R, T) and bool(jnp.all(entropy > -1e-5)) and np.isfinite(entropy).all()


def test_unguided_logp_is_that_of_the_image_head():
    out = generate(PARAMS, IDS, LENGTHS, keys_of(3, 2), 5, FREE)
    logits = MODEL.apply({"params": PARAMS}, full()(rows_with(out["codes"][:, 1])), method="image_logits")
    rows, cols = np.arange(3)[:, None], LENGTHS[:, None] - 1 + np.arange(5)
    expected = np.take_along_axis(jax.nn.log_softmax(logits)[rows, cols], np.asarray(out["codes"][:, 1, :, None]), -1)[..., 0]
    np.testing.assert_allclose(out["logp"][:, 1], expected, atol=1e-4)


def test_replay_is_differentiable_under_truncation():
    sampling, codes = SamplingConfig(top_k=3, min_p=0.0), np.array([[1, 5]])
    packed = np.packbits(np.isin(np.arange(14), [1, 5, 6])[None, None].repeat(2, 1), axis=-1)

    model = ARTransformer(dataclasses.replace(CFG, n_adapter_layers=0, n_language_layers=1, n_head_layers=0))

    def total(params):
        return sum(jnp.sum(x) for x in replay(model, params, IDS[:1], LENGTHS[:1], codes, sampling, packed, chunk=1))

    grads = jax.jit(jax.grad(total))(random_params(model.cfg)[1])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["mm_head"]["kernel"]).max() > 0 and np.abs(grads["lm_head"]["kernel"]).max() == 0


def test_text_equals_naive_greedy_and_stops():
    expected, max_new = [], 6
    logits = jax.jit(lambda ids: MODEL.apply({"params": PARAMS}, MODEL.apply({"params": PARAMS}, ids), method="text_logits"))
    for ids, n in zip(IDS, LENGTHS):
        row = np.pad(ids[:n], (0, 7 + max_new - n))
        for t in range(max_new):
            row[n + t] = np.argmax(logits(row[None])[0, n + t - 1])
        expected.append(row[n : n + max_new])
    stop = int(expected[0][2])
    text = jax.jit(lambda stops: generate_text(MODEL, PARAMS, IDS, LENGTHS, max_new, stops, pad_id=23))
    got = text([stop])
    for row, want in zip(got, expected):
        end = int(np.argmax(want == stop)) + 1 if stop in want else max_new
        assert row.tolist() == [*want[:end], *[23] * (max_new - end)]
    assert 23 in got[0].tolist()


def test_meshes_sample_the_same_codes():
    ids, lengths = np.concatenate([IDS, IDS[:1]]), np.concatenate([LENGTHS, LENGTHS[:1]])
    sampling = SamplingConfig(top_k=6, min_p=0.02, guidance=1.5)
    alone = generate(PARAMS, ids, lengths, keys_of(4, 2), 3, sampling, NEGATIVE)
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        spread = generate(jax.device_put(PARAMS, param_shardings(BOXED, mesh)), ids, lengths, keys_of(4, 2), 3, sampling, NEGATIVE)
    np.testing.assert_array_equal(spread["codes"], alone["codes"])
    np.testing.assert_allclose(spread["logp"], alone["logp"], atol=1e-4)
