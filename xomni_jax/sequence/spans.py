"""Sequences of ids as spans of text and images, and back: `unparse(parse(ids)) == ids`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xomni_jax.sequence.tokenizer import MultimodalTokenizer


class SpanError(ValueError):
    """A sequence violates the format; the message names the position."""


@dataclass(frozen=True, eq=False)
class TextSpan:
    """Text ids [L]."""

    ids_L: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """Codes [Y, X] of one image, 0-based."""

    codes_YX: np.ndarray


def parse(ids: np.ndarray, tokenizer: MultimodalTokenizer) -> list[TextSpan | ImageSpan]:
    """Ids [L] -> spans in order, with any number of images. Raises SpanError at the first position that violates the format."""
    ids_L = np.asarray(ids)
    t = tokenizer
    bad = np.flatnonzero((ids_L < 0) | (ids_L >= t.vocab_size + t.mm_vocab_size))
    if bad.size:
        raise SpanError(f"Position {bad[0]}: id {ids_L[bad[0]]} is outside 0..{t.vocab_size + t.mm_vocab_size - 1}.")
    spans: list[TextSpan | ImageSpan] = []
    at = 0
    while at < len(ids_L):
        stop = _next(ids_L >= t.vocab_size, at)
        if stop > at:
            spans.append(TextSpan(ids_L[at:stop].astype(np.int32)))
        if stop == len(ids_L):
            break
        if ids_L[stop] != t.som:
            raise SpanError(f"Position {stop}: {_name(ids_L[stop], t)} stands outside an image; an image starts with <SOM>.")
        codes_YX, at = _image(ids_L, stop, t)
        spans.append(ImageSpan(codes_YX))
    return spans


def unparse(spans: Iterable[TextSpan | ImageSpan], tokenizer: MultimodalTokenizer) -> np.ndarray:
    """Spans -> ids [L]."""
    parts = [s.ids_L if isinstance(s, TextSpan) else tokenizer.image_ids(s.codes_YX) for s in spans]
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _image(ids_L: np.ndarray, som: int, t: MultimodalTokenizer) -> tuple[np.ndarray, int]:
    """Codes of the image whose `<SOM>` stands at `som`, and the position after its `<EOM>`."""
    image = _next(ids_L >= t.vocab_size, som + 1)
    if image == len(ids_L) or ids_L[image] != t.image:
        found = "the end of the sequence" if image == len(ids_L) else _name(ids_L[image], t)
        raise SpanError(f"Position {image}: {found} follows <SOM> at {som} where <IMAGE> is due.")
    text = t.decode_text(ids_L[som + 1 : image])
    size = re.fullmatch(r"([1-9]\d*) ([1-9]\d*)", text, re.ASCII)
    if not size:
        raise SpanError(f"Position {som + 1}: the image size {text!r} is not 'ROWS COLUMNS'.")
    y, x = int(size[1]), int(size[2])

    first = image + 1
    stop = _next((ids_L < t.vocab_size) | (ids_L >= t.vocab_size + t.image_vocab_size), first)
    if stop == len(ids_L):
        raise SpanError(f"Position {stop}: the sequence ends before the <EOM> of the image at {som} ({stop - first} of {y * x} codes).")
    if ids_L[stop] != t.eom:
        raise SpanError(f"Position {stop}: {_name(ids_L[stop], t)} inside the image at {som}; only codes may stand before its <EOM>.")
    if stop - first != y * x:
        raise SpanError(f"Position {stop}: the image at {som} holds {stop - first} codes, but its size {y} x {x} needs {y * x}.")
    return (ids_L[first:stop] - t.vocab_size).astype(np.int32).reshape(y, x), stop + 1


def _next(hits_L: np.ndarray, start: int) -> int:
    """First True position from `start` on, or the length."""
    found = np.flatnonzero(hits_L[start:])
    return start + int(found[0]) if found.size else len(hits_L)


def _name(k: int, t: MultimodalTokenizer) -> str:
    known = {t.som: "<SOM>", t.eom: "<EOM>", t.image: "<IMAGE>"}
    if int(k) in known:
        return known[int(k)]
    if t.vocab_size <= k < t.vocab_size + t.image_vocab_size:
        return f"image code {int(k) - t.vocab_size}"
    return f"text id {int(k)}" if k < t.vocab_size else f"the unused id {int(k)}"
