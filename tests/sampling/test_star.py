"""Codes in the order of spanning trees (STAR): the sampler, its replay and training compute one thing, and row by row is the old model."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transformer import random_params
from tests.sampling.test_generate import CFG as RASTER
from tests.sampling.test_generate import FREE, IDS, LENGTHS, NEGATIVE, PARAMS, V, keys_of
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.keys import image_orders
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sequence.orders import completion_order, tree_order
from xomni_jax.sequence.packing import pack
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.next_token import NextTokenConfig, next_token_loss, pack_batch

MODEL, PLAIN = ARTransformer(dataclasses.replace(RASTER, order="spanning_tree")), ARTransformer(RASTER)
GRID, T = (2, 4), 8
KEYS = keys_of(3, 2)
ORDERS = image_orders("spanning_tree", GRID, KEYS)
TRUNCATED = SamplingConfig(0.9, 5, 0.9, 0.02, guidance=2.5)


@functools.cache
def sampler(model, sampling=FREE, most=T):
    return Sampler.make(model, GRID, sampling, most, return_mask=True)


def rows_of(x):
    return np.repeat(np.asarray(x), 2, axis=0)


def replay(model, made, sampling, orders):
    """Log-probs [P, R, T] of a full pass over codes as they were drawn."""
    codes = made["codes"] if orders is None else np.take_along_axis(np.asarray(made["codes"]), orders, axis=2)
    image = Segment(codes, None, None, made["sampling_mask"], "image", image_spec(T, sampling), orders)
    score = jax.jit(lambda p, image: Engine(model).score(p, (rows_of(IDS), rows_of(LENGTHS)), (image,), NEGATIVE, 2)[0][0])
    return np.asarray(score(PARAMS, image.rows())).reshape(3, 2, T)


def test_orders_depend_on_the_key_alone():
    np.testing.assert_array_equal(image_orders("spanning_tree", GRID, KEYS[1:, 1:]), ORDERS[1:, 1:])
    assert len(np.unique(ORDERS.reshape(-1, T), axis=0)) > 1
    assert image_orders("raster", GRID, KEYS) is None


@pytest.mark.parametrize("sampling", [FREE, TRUNCATED], ids=["free", "truncated"])
def test_replay_equals_the_sampler(sampling):
    """Of prompts of unequal length, in segments of 2 codes; float32, so that only the order of sums differs."""
    made = sampler(MODEL, sampling, 2)(PARAMS, IDS, LENGTHS, KEYS, NEGATIVE, None, ORDERS)
    np.testing.assert_array_equal(made["order"], ORDERS)
    np.testing.assert_allclose(replay(MODEL, made, sampling, ORDERS), made["logp"], atol=2e-5)
    if sampling is FREE:
        wrong = replay(MODEL, made, sampling, np.ascontiguousarray(ORDERS[:, ::-1]))
        assert np.abs(wrong - made["logp"]).max() > 0.01


def test_row_by_row_is_the_model_of_before():
    ids = np.random.default_rng(0).integers(0, V + 14, (2, 12)).astype(np.int32)
    one, other = (jax.jit(lambda i, model=model: model.apply({"params": PARAMS}, i))(ids) for model in (MODEL, PLAIN))
    np.testing.assert_array_equal(one, other)
    raster = np.broadcast_to(np.arange(T, dtype=np.int32), (3, 2, T))
    made = sampler(PLAIN)(PARAMS, IDS, LENGTHS, KEYS, None)
    np.testing.assert_array_equal(replay(MODEL, made, FREE, raster), replay(PLAIN, made, FREE, None))
    again = sampler(MODEL)(PARAMS, IDS, LENGTHS, KEYS, None, None, raster)
    np.testing.assert_array_equal(again["codes"], made["codes"])
    np.testing.assert_allclose(again["logp"], made["logp"], atol=2e-5)  # the last token of a prompt is run apart


def test_a_token_knows_the_next_cell_and_no_later_one():
    """The hidden state of the second code, after the cells 0 and 1 of the grid, while the third cell is 2 or 5, or the fourth changes."""
    ids = np.array([[3, V + 15, *(V + np.arange(8))]], np.int32)

    def hidden(*order):
        positions = np.array([[0, 1, *(2 + np.array(order))]], np.int32)
        return MODEL.apply({"params": PARAMS}, ids, positions)[0, 3]

    here = hidden(0, 1, 2, 3, 4, 5, 6, 7)
    np.testing.assert_array_equal(here, hidden(0, 1, 2, 6, 4, 5, 3, 7))
    assert jnp.abs(here - hidden(0, 1, 5, 3, 4, 2, 6, 7)).max() > 1e-3


@pytest.mark.parametrize("model", [MODEL, PLAIN], ids=["spanning_tree", "raster"])
def test_known_codes_stay(model):
    known = np.array([[-1, 3, 1, -1], [-1, 0, 9, 13]])
    orders = image_orders(model.cfg.order, GRID, KEYS, known >= 0)
    at = np.broadcast_to(np.arange(T), (3, 2, T)) if orders is None else orders
    given = known.ravel()[at].astype(np.int32)
    assert orders is None or (given[..., :5] >= 0).all()
    made = sampler(model)(PARAMS, IDS, LENGTHS, KEYS, NEGATIVE, None, orders, given)
    codes = np.asarray(made["codes"])
    np.testing.assert_array_equal(codes[..., known.ravel() >= 0], np.broadcast_to(known[known >= 0], (3, 2, 5)))
    assert len(np.unique(codes[..., known.ravel() < 0])) > 1
    want = np.where(given < 0, replay(model, made, FREE, orders), 0.0)
    np.testing.assert_allclose(made["logp"], want, atol=2e-5)


def test_training_learns_the_log_probs_of_the_sampler():
    """The loss of packed rows is the mean log-prob that the engine replays."""
    tok = MultimodalTokenizer.load()
    cfg = dataclasses.replace(MODEL.cfg, vocab_size=tok.vocab_size, image_vocab_size=tok.image_vocab_size, mm_vocab_size=tok.mm_vocab_size)
    model, rng = ARTransformer(cfg), np.random.default_rng(0)
    params = random_params(cfg)[1]
    codes, orders = rng.integers(0, 50, (2, *GRID)), np.stack([tree_order(GRID, rng) for _ in range(2)])
    texts = "a red sign", "dot"
    rows = [tok.generation_sequence(*row) for row in zip(texts, codes, orders)]
    batch, _ = pack_batch(rows, tok, NextTokenConfig(rows=1, row_length=64))
    loss = next_token_loss(model, params, batch, batch, NextTokenConfig())[0]
    drawn = np.take_along_axis(codes.reshape(2, T), orders, axis=1).astype(np.int32)
    want = []
    for text, ids, order in zip(texts, drawn, orders):
        prompt = tok.generation_prompt(text, *GRID)
        image = Segment(ids[None], kind="image", spec=image_spec(T, FREE), order=order[None])
        want.append(Engine(model).score(params, (prompt[None], np.array([len(prompt)])), (image,))[0][0])
    np.testing.assert_allclose(loss, -np.mean(want), rtol=1e-5)


def test_positions_of_a_row_by_row_sequence_are_those_of_before():
    tok, codes = MultimodalTokenizer.load(), np.arange(8).reshape(GRID)
    sequence = tok.generation_sequence("dot", codes)
    ordered = tok.generation_sequence("dot", codes, np.arange(8))
    for a, b in zip(pack([sequence], 32, tok.pad)[0], pack([ordered], 32, tok.pad)[0]):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="is no permutation of the cells 0..7"):
        tok.generation_sequence("dot", codes, completion_order(np.zeros((3, 3), bool), np.random.default_rng(0)))


def test_one_code_per_pass():
    with pytest.raises(ValueError, match="sampling window=4: a model of order spanning_tree draws one code per pass; use window 1"):
        sampler(MODEL, SamplingConfig(window=4))
