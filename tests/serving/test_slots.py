"""Rows that come and go: what a row samples depends on itself alone."""

import dataclasses

import jax
import numpy as np

from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import GREEDY, SamplingConfig, TracedSampling
from xomni_jax.serving.slots import Entry, fitting, image_slots, row_counts, text_slots
from xomni_jax.sharding.mesh import make_mesh

GRID, PROMPTS = (2, 4), ["a", 'a red sign that says "AB"', "two blue circles"]
SETTINGS = [SamplingConfig(), SamplingConfig(temperature=0.8, top_k=0, top_p=0.9), SamplingConfig(temperature=0.0)]


def drawn(slots, rows, joins):
    """Tokens of rows (prompt, key, settings, slot), row i entering before segment joins[i]; other slots hold what they hold."""
    model, made = slots.model, [[] for _ in rows]
    for n in range(max(joins) + 8 // slots.segment):
        for (prompt, key, settings, slot), at in zip(rows, joins):
            if at == n:
                ids = model.tokenizer.generation_prompt(prompt, *GRID)
                negative = model.tokenizer.image_prefix(*GRID) if slots.shape.guided else None
                slots.enter([Entry(slot, ids, negative, np.asarray(jax.random.key_data(key)), settings)])
        used = 1 + max(slot for (*_, slot), at in zip(rows, joins) if at <= n)
        out = slots.advance(used)["tokens"]
        for row, (*_, slot), at in zip(made, rows, joins):
            if at <= n < at + 8 // slots.segment:
                row.extend(out[slot])
    return np.array(made)


def test_rows_that_join_between_segments_draw_what_they_draw_alone(model):
    """To the bit, and the codes of the pipeline's own sampler; without guidance: `test_server`."""
    keys = image_keys(3, 3)
    settings = [dataclasses.replace(s, guidance=2.0) for s in SETTINGS]
    shape = TracedSampling.of(settings[1])
    slots = image_slots(model, GRID, shape, 4, 64, 2)
    rows = [(p, k, s, slot) for p, k, s, slot in zip(PROMPTS, keys, settings, (0, 2, 3))]
    together = drawn(slots, rows, [0, 1, 3])  # at first one slot is run alone
    alone = [drawn(slots, [(*row[:3], 1)], [0])[0] for row in rows]
    np.testing.assert_array_equal(together, alone)
    own = [model.sample_codes([p], GRID, k[None, None], s)["codes"].reshape(-1) for p, k, s, _ in rows]
    np.testing.assert_array_equal(together, own)


def test_a_mesh_draws_the_same(model, model_dir):
    """Slots are split over the data axes, heads over tensor."""
    shape = TracedSampling.of(SETTINGS[1])
    sharded = image_slots(model.on(make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])), GRID, shape, 4, 64, 4)
    rows = [(p, k, s, slot) for p, k, s, slot in zip(PROMPTS, image_keys(3, 3), SETTINGS, (1, 0, 3))]
    np.testing.assert_array_equal(drawn(sharded, rows, [0, 0, 1]), drawn(image_slots(model, GRID, shape, 4, 64, 4), rows, [0, 0, 1]))


def test_few_programs_of_whole_data_shards():
    assert row_counts(16) == [1, 4, 16] and row_counts(12) == [1, 3, 12] and row_counts(16, 4) == [4, 16] and row_counts(8, 2) == [2, 8]
    assert [fitting(n, [1, 4, 16]) for n in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]


def test_texts_are_those_of_the_pipeline(model, rng):
    codes = rng.integers(0, 64, (2, *GRID))
    slots = text_slots(model, 8, TracedSampling.of(GREEDY), 2, 64, 4)
    prompts = [model.tokenizer.understanding_prompt(c, q) for c, q in zip(codes, ("what?", "what colour is it?"))]
    slots.enter([Entry(slot, ids, None, np.zeros(2, np.uint32), GREEDY) for slot, ids in enumerate(prompts)])
    tokens = np.concatenate([slots.advance(4)["tokens"] for _ in range(2)], axis=1)
    own = np.asarray(model.answer_ids(codes, ["what?", "what colour is it?"], 8))
    for row, want in zip(tokens, own):
        n = int(np.argmax(want == model.tokenizer.end_of_turn)) + 1 if model.tokenizer.end_of_turn in want else 8
        np.testing.assert_array_equal(row[:n], want[:n])
