"""Words of the rendered signs, and the words and combinations of shapes that are held out of training.

A held-out word never appears in a training sign, not even inside another word, so a model that writes it has learned to spell. A held-out
(shape, colour, count) is never drawn for training, so a model that draws it has learned to compose.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from importlib import resources
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Words that are part of another word are never held out: 21% of the others are about 15% of all words.
HELDOUT_WORDS, HELDOUT_SHAPES = 0.21, 0.15
_VOWELS, _CONSONANTS = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"


def stable_fraction(key: str) -> float:
    """A number in [0, 1) from a hash of `key`, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


@functools.cache
def all_words() -> tuple[str, ...]:
    """The listed English words, upper case, 2 to 8 letters, in the order of the file."""
    return tuple((resources.files("xomni_jax") / "assets" / "words.txt").read_text().upper().split())


@functools.cache
def words(split: Split) -> tuple[str, ...]:
    """The words of one split. A word that is part of another is in "train", so that training text never contains a held-out word."""
    listed = all_words()
    parts = {w[i:j] for w in listed for i, j in itertools.combinations(range(len(w) + 1), 2) if j - i < len(w)}
    held = {w for w in listed if w not in parts and stable_fraction(f"word:{w}") < HELDOUT_WORDS}
    return tuple(w for w in listed if (w in held) == (split == "heldout"))


def is_heldout_shape(shape: str, colour: str, count: int) -> bool:
    """Whether this combination is held out of training."""
    return stable_fraction(f"shape:{shape}:{colour}:{count}") < HELDOUT_SHAPES


def contains_heldout(text: str) -> bool:
    """Whether any held-out word occurs in `text`, also inside a longer word."""
    lengths, held = _heldout_index()
    return any(text[i : i + n] in held for n in lengths for i in range(len(text) - n + 1))


def pseudo_word(rng: np.random.Generator, length: int) -> str:
    """A made-up word for training without a held-out word in it: alternating consonants and vowels, or uniform letters, half each."""
    while True:
        if rng.random() < 0.5:
            first = int(rng.integers(2))
            letters = [_pick(rng, _CONSONANTS if (i + first) % 2 else _VOWELS) for i in range(length)]
        else:
            letters = [chr(65 + k) for k in rng.integers(26, size=length)]
        word = "".join(letters)
        if not contains_heldout(word):
            return word


def phrase(rng: np.random.Generator, split: Split, length: int, pseudo: float = 0.0) -> str:
    """Text of exactly `length` characters: one to three words joined by spaces. Phrases of the same number of words are equally likely.

    Args:
      pseudo: share of words replaced by made-up ones of the same length; for training only.

    Raises:
      ValueError: no words of the split add up to `length`.
    """
    shapes, chances = _compositions(split, length)
    by_length = _by_length(split)
    lengths = shapes[int(np.searchsorted(chances, rng.random(), side="right"))]
    drawn = (pseudo_word(rng, n) if pseudo and rng.random() < pseudo else _pick(rng, by_length[n]) for n in lengths)
    return " ".join(drawn)


@functools.cache
def _heldout_index() -> tuple[tuple[int, ...], frozenset[str]]:
    held = words("heldout")
    return tuple(sorted({len(w) for w in held})), frozenset(held)


@functools.cache
def _by_length(split: Split) -> dict[int, tuple[str, ...]]:
    return {n: tuple(group) for n, group in itertools.groupby(sorted(words(split), key=len), key=len)}


@functools.cache
def _compositions(split: Split, length: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Word lengths that fill `length` characters, and their cumulative chances: single words where they exist take 80%."""
    counts = {n: len(group) for n, group in _by_length(split).items()}
    found: list[tuple[int, ...]] = []
    weights: list[float] = []
    share = {1: 0.8, 2: 0.2 if length in counts else 0.6, 3: 0.0 if length in counts else 0.4}
    for k in (1, 2, 3):
        fits = [c for c in itertools.product(counts, repeat=k) if sum(c) + k - 1 == length]
        size = np.array([float(np.prod([counts[n] for n in c])) for c in fits])
        if len(fits) and share[k]:
            found += fits
            weights += list(share[k] * size / size.sum())
    if not found:
        raise ValueError(f"No text of {length} characters can be made of 1 to 3 words; use 2 to {3 * max(counts) + 2}.")
    chances = np.cumsum(weights) / np.sum(weights)
    chances[-1] = 1.0
    return found, chances


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
