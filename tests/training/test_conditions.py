"""Images that start from others (OmniGen-AR): what is learned, and that leaving the input out is attention that is masked from it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transformer import CFG as BASE
from tests.models.test_transformer import random_params
from xomni_jax.data.edits import EditsConfig
from xomni_jax.data.sources import DataSection, first_batch
from xomni_jax.models import transformer
from xomni_jax.models.attention import attend
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.next_token import NextTokenConfig, build_sequences, pack_batch
from xomni_jax.training.pretrain import images_of

TOK = MultimodalTokenizer.load()
CFG = dataclasses.replace(BASE, vocab_size=TOK.vocab_size, image_vocab_size=TOK.image_vocab_size, mm_vocab_size=TOK.mm_vocab_size)
CONDITIONS = [np.arange(6).reshape(2, 3), np.arange(7, 11).reshape(2, 2)]
TARGET = np.arange(20, 28).reshape(2, 4)
TEXT = "make it red"


@pytest.mark.parametrize("order", ["raster", "spanning_tree"])
def test_hiding_is_masking(order, monkeypatch):
    """Hidden states of text and image on the short row against those of the whole row with the mask; float32, the bound is 1e-6 of the
    largest value."""
    model, params = transformer.ARTransformer(dataclasses.replace(CFG, order=order)), random_params(CFG)[1]
    cells = None if order == "raster" else np.random.default_rng(0).permutation(8)
    shown = TOK.generation_sequence(TEXT, TARGET, cells, CONDITIONS)
    hidden = TOK.generation_sequence(TEXT, TARGET, cells, CONDITIONS, hidden=True)
    n, text = len(shown.ids_L) - len(hidden.ids_L), len(TOK.encode_text(TEXT))
    assert n == sum(len(TOK.image_ids(codes)) for codes in CONDITIONS)
    kept = np.r_[:text, text + n : len(shown.ids_L)]
    np.testing.assert_array_equal(hidden.ids_L, shown.ids_L[kept])
    np.testing.assert_array_equal(hidden.positions_L, shown.positions_L[kept])
    np.testing.assert_array_equal(hidden.loss_L, shown.loss_L[kept])

    def run(row):
        return np.asarray(model.apply({"params": params}, row.ids_L[None], row.positions_L[None])[0])

    open_row, short = run(shown), run(hidden)
    at = np.arange(len(shown.ids_L))
    masked_LS = (at[:, None] >= text + n) & (at >= text) & (at < text + n)
    bias = jnp.where(masked_LS, jnp.finfo(jnp.float32).min, 0.0)[None, None]
    monkeypatch.setattr(transformer, "attend", lambda *qkv, query_chunk, **more: attend(*qkv, bias=bias, **more))
    masked = run(shown)
    np.testing.assert_allclose(short, masked[kept], atol=1e-6 * np.abs(masked).max())
    assert np.abs(open_row[kept] - short).max() > 0.01  # the condition matters


def test_the_image_alone_is_learned_and_inference_is_plain_causal():
    sequence = TOK.generation_sequence(TEXT, TARGET, None, CONDITIONS)
    np.testing.assert_array_equal(sequence.ids_L[sequence.loss_L] - TOK.vocab_size, TARGET.ravel())
    prompt = TOK.generation_prompt(TEXT, *TARGET.shape, conditions=CONDITIONS)
    np.testing.assert_array_equal(sequence.ids_L[: len(prompt)], prompt)
    batch, _ = pack_batch([sequence], TOK, NextTokenConfig(rows=1, row_length=len(sequence.ids_L)))
    model, params = transformer.ARTransformer(CFG), random_params(CFG)[1]
    run = jax.jit(lambda *row: model.apply({"params": params}, *row))
    np.testing.assert_array_equal(run(batch.ids_BL, batch.positions_BL), run(sequence.ids_L[None]))


@pytest.mark.parametrize("share, hidden", [(0.0, 0), (0.5, 98)])
def test_the_share_of_rows_without_their_input(share, hidden):
    """Binomial with n = 200, p = 0.5, of seed 0."""
    examples = {"id": [str(n) for n in range(200)], "caption": [TEXT] * 200}
    cfg = NextTokenConfig(generation=1.0, understanding=0.0, text=0.0, drop_prompt=0.0, hide_condition=share)
    rows = build_sequences(examples, [[*CONDITIONS, TARGET]] * 200, TOK, cfg, np.random.default_rng(0))
    short = min(len(row.ids_L) for row in rows)
    found = sum(len(row.ids_L) == short for row in rows) if share else len({len(row.ids_L) for row in rows}) - 1
    assert abs(found - hidden) < 25


def test_input_images_come_before_the_one_that_comes_out():
    a, b, c = (np.full((2, 2, 3), n, np.uint8) for n in range(3))
    examples = {
        "images": [[a, b, c], [a, b], None], "image": [b, a, c], "roles": [("input", "output", "input"), (), None], "turns": [(), (), ()]
    }  # fmt: skip
    assert [[int(image.max()) for image in images_of(examples, i)] for i in range(3)] == [[0, 2, 1], [0], [2]]


def test_a_batch_of_edits_becomes_sequences():
    batch = first_batch(DataSection("edits", EditsConfig()), 0, 4)
    images = [images_of(batch, i) for i in range(4)]
    assert [[image.shape for image in own] for own in images] == [[(32, 64, 3)] * 2] * 4
    codes = [[np.full((4, 8), k) for k in range(2)] for _ in images]
    cfg = NextTokenConfig(generation=1.0, understanding=0.0, text=0.0, drop_prompt=0.0, hide_condition=0.0)
    rows = build_sequences(batch, codes, TOK, cfg, np.random.default_rng(0))
    prompts = [TOK.generation_prompt(text, 4, 8, conditions=own[:1]) for text, own in zip(batch["caption"], codes)]
    for row, prompt in zip(rows, prompts):
        np.testing.assert_array_equal(row.ids_L[: len(prompt)], prompt)
        assert (row.ids_L[row.loss_L] == TOK.vocab_size + 1).all() and row.loss_L.sum() == 32
