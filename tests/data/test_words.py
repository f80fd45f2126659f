"""The held-out split is disjoint by construction."""

import numpy as np
import pytest

from xomni_jax.data import words


def test_list_is_clean():
    listed = words.all_words()
    assert len(set(listed)) == len(listed) > 900
    assert all(w.isascii() and w.isalpha() and w.isupper() and 2 <= len(w) <= 8 for w in listed)


def test_split_is_stable_and_about_15_percent():
    train, held = words.words("train"), words.words("heldout")
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(words.all_words())
    assert 0.13 < len(held) / len(words.all_words()) < 0.17
    # Computed once: a change of the hash would leak held-out words into runs that go on.
    assert words.stable_fraction("word:HELLO") == pytest.approx(0.1998247, abs=1e-6) and "HELLO" in held


def test_no_training_word_contains_a_heldout_word():
    held = words.words("heldout")
    assert not [(t, h) for t in words.words("train") for h in held if h in t]
    assert words.contains_heldout("XXHELLOX") and not words.contains_heldout("XXHELOX")


@pytest.mark.parametrize("split", words.SPLITS)
@pytest.mark.parametrize("length", [3, 5, 8, 9, 12, 13, 16, 17])
def test_phrases_have_exactly_the_length(split, length):
    rng = np.random.default_rng(length)
    for _ in range(50):
        text = words.phrase(rng, split, length)
        assert len(text) == length and set(text.split(" ")) <= set(words.words(split))


def test_pseudo_words_hold_no_heldout_word(rng):
    made = [words.pseudo_word(rng, int(rng.integers(2, 9))) for _ in range(2000)]
    assert not [m for m in made if any(h in m for h in words.words("heldout"))]
    assert {c for m in made for c in m} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_phrase_errors(rng):
    with pytest.raises(ValueError, match=r"No text of 40 characters can be made of 1 to 3 words; use 2 to 26\."):
        words.phrase(rng, "train", 40)
