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
        sequences = _sequences(rng, 17, 22)
        fitting = [i for i, s in enumerate(sequences) if len(s.ids_L) <= 19]
        batch, left = pack(sequences, 19, PAD, rows)
        placed = [
            [int(batch.members_BL[r][batch.segments_BL[r] == k][0]) for k in range(1, row.max() + 1)]
            for r, row in enumerate(batch.segments_BL)
        ]
        assert sorted(sum(placed, left)) == list(range(17)) and len(batch.ids_BL) == (rows or len(placed))
        if rows is None:
            assert left == [i for i in range(17) if i not in fitting]
        for r, row in enumerate(placed):
            at = 0
            for k, i in enumerate(row):
                for j, (token, loss) in enumerate(zip(sequences[i].ids_L, sequences[i].loss_L, strict=True)):
                    got = (batch.ids_BL[r, at], batch.segments_BL[r, at], batch.positions_BL[r, at], batch.loss_BL[r, at])
                    assert got == (token, k + 1, j, loss) and batch.members_BL[r, at] == i
                    at += 1
            assert (batch.ids_BL[r, at:] == PAD).all() and not batch.segments_BL[r, at:].any() and not batch.loss_BL[r, at:].any()
            assert (batch.members_BL[r, at:] == -1).all()
            # Whatever is left over fits nowhere.
            assert all(len(sequences[i].ids_L) > 19 - at for i in left)


def mixed_lengths(rng, n):
    """Text of 20 to 200 tokens, captions with images of 64 or 256 codes, conversations of one to six turns with one image or two."""
    text = rng.integers(20, 201, n)
    image = rng.integers(5, 60, n) + rng.choice([64, 256], n) + 6
    talk = rng.integers(1, 7, n) * rng.integers(30, 80, n) + rng.integers(1, 3, n) * 262
    return rng.choice(np.concatenate([text, image, talk]), n, replace=False)


@pytest.mark.parametrize("length", [1024, 2048])
def test_a_mixed_set_fills_the_rows(rng, length):
    """At least 97 % without leaving anything out; with a tenth too many 98 %, and then the short ones are no more often left out."""
    rates, shorts = [], []
    for _ in range(5):
        sizes = mixed_lengths(rng, 600)
        sequences = [TokenSequence(np.zeros(n, np.int32), np.ones(n, bool)) for n in sizes]
        batch, left = pack(sequences, length, PAD)
        assert left == []
        rates.append((batch.segments_BL > 0).mean())
        rows = int(sizes.sum() / 1.1 / length)
        batch, left = pack(sequences, length, PAD, rows)
        assert (batch.segments_BL > 0).mean() > 0.98
        shorts.append(np.mean(sizes[left] < 200) - np.mean(sizes < 200))
    print(f"rows of {length} tokens are filled to {min(rates):.2%} and more")
    assert min(rates) > 0.97 and abs(np.mean(shorts)) < 0.25


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
    assert row[at[0]] == tok.image and at.tolist() == list(range(at[0], at[0] + 6)) and (batch.members_BL[0, at] == 0).all()
    np.testing.assert_array_equal(ids[at], codes_YX.ravel() + tok.vocab_size)
    assert tok.text.convert_ids_to_tokens(ids[text].tolist())[-1] == "<|im_end|>" and tok.decode_text(ids[text]) == "star"


def test_sequences_longer_than_a_row_are_left_over():
    batch, left = pack([TokenSequence(np.zeros(n, np.int32), np.zeros(n, bool)) for n in (4, 9, 8)], 8, PAD)
    assert left == [1] and batch.members_BL[:, 0].tolist() == [2, 0]


def test_empty():
    batch, left = pack([], 8, PAD, rows=2)
    assert batch.ids_BL.shape == (2, 8) and left == [] and unpack(batch) == [] and not targets(batch, VOCAB, IMAGE_VOCAB).text_BL.any()
