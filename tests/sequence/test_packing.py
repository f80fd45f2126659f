"""Packing against a plain loop, and which position predicts what."""

import numpy as np
import pytest

from xomni_jax.sequence.packing import PackedBatch, pack, targets
from xomni_jax.sequence.tokenizer import MultimodalTokenizer, TokenSequence

VOCAB, IMAGE_VOCAB, PAD = 40, 24, 3


def _sequences(rng, n, longest):
    return [TokenSequence(rng.integers(0, 70, size).astype(np.int32), rng.random(size) < 0.6) for size in rng.integers(1, longest + 1, n)]


def unpack(batch: PackedBatch) -> list[TokenSequence]:
    """The sequences of a batch, row by row."""
    rows = zip(batch.ids_BL, batch.segments_BL, batch.loss_BL, strict=True)
    return [TokenSequence(ids[s == n], loss[s == n]) for ids, s, loss in rows for n in range(1, int(s.max(initial=0)) + 1)]


@pytest.mark.parametrize("rows", [None, 3])
def test_against_brute_force(rng, rows):
    for _ in range(20):
        sequences = _sequences(rng, 17, 13)
        batch, left = pack(sequences, 19, PAD, rows)
        want: list[list[TokenSequence]] = [[] for _ in range(rows or 0)]
        unplaced = []
        for i, s in enumerate(sequences):
            for row in want:
                if sum(len(t.ids_L) for t in row) + len(s.ids_L) <= 19:
                    row.append(s)
                    break
            else:
                if rows is None:
                    want.append([s])
                else:
                    unplaced.append(i)
        assert left == unplaced and len(batch.ids_BL) == len(want)
        for r, row in enumerate(want):
            at = 0
            for k, s in enumerate(row):
                for j, (token, loss) in enumerate(zip(*s, strict=True)):
                    got = (batch.ids_BL[r, at], batch.segments_BL[r, at], batch.positions_BL[r, at], batch.loss_BL[r, at])
                    assert got == (token, k + 1, j, loss)
                    at += 1
            assert (batch.ids_BL[r, at:] == PAD).all() and not batch.segments_BL[r, at:].any() and not batch.loss_BL[r, at:].any()


def test_unpack_returns_every_sequence(rng):
    sequences = _sequences(rng, 23, 11)
    batch, left = pack(sequences, 16, PAD)
    found = unpack(batch)
    assert left == [] and sorted(tuple(s.ids_L) for s in found) == sorted(tuple(s.ids_L) for s in sequences)


def test_targets_against_brute_force(rng):
    batch, _ = pack(_sequences(rng, 30, 9), 14, PAD)
    ids, text, image = targets(batch, VOCAB, IMAGE_VOCAB)
    for b, row in enumerate(batch.ids_BL):
        for i in range(len(row)):
            inside = i + 1 < len(row) and batch.segments_BL[b, i + 1] == batch.segments_BL[b, i] > 0 and batch.loss_BL[b, i + 1]
            nxt = row[i + 1] if inside else -1
            assert text[b, i] == (0 <= nxt < VOCAB) and image[b, i] == (VOCAB <= nxt < VOCAB + IMAGE_VOCAB)
            assert ids[b, i] == (nxt if text[b, i] or image[b, i] else 0)


def test_targets_of_real_sequences():
    tok = MultimodalTokenizer.load()
    codes_YX = np.arange(6).reshape(2, 3)
    generation, question = (
        tok.generation_sequence("a cat", codes_YX),
        tok.understanding_sequence(codes_YX, "which shape is it?", "star"),
    )
    batch, _ = pack([generation, question], 80, tok.pad)
    ids, text, image = (t[0] for t in targets(batch, tok.vocab_size, tok.image_vocab_size))
    row = batch.ids_BL[0]
    at = np.flatnonzero(image)
    # The first code is predicted at <IMAGE>, and only the generation sequence has image targets.
    assert row[at[0]] == tok.image and at.tolist() == list(range(at[0], at[0] + 6)) and at[-1] < len(generation.ids_L)
    np.testing.assert_array_equal(ids[at], codes_YX.ravel() + tok.vocab_size)
    assert tok.text.convert_ids_to_tokens(ids[text].tolist())[-1] == "<|im_end|>" and tok.decode_text(ids[text]) == "star"


def test_errors():
    with pytest.raises(ValueError, match=r"Sequence 1 has 9 tokens, more than a row of 8; raise the row length or cut it\."):
        pack([TokenSequence(np.zeros(n, np.int32), np.zeros(n, bool)) for n in (4, 9)], 8, PAD)


def test_empty():
    batch, left = pack([], 8, PAD, rows=2)
    assert batch.ids_BL.shape == (2, 8) and left == [] and unpack(batch) == [] and not targets(batch, VOCAB, IMAGE_VOCAB).text_BL.any()
