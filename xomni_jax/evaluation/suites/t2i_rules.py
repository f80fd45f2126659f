"""What T2I-CompBench takes from a prompt, as spaCy parsed it, and its rule for the position of two boxes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xomni_jax.evaluation.suite import SuiteError

MODEL = "en_core_web_sm"
_MOST_PHRASES = 8
_NO_OBJECT = ("top", "the side", "the left", "the right")  # noun phrases that name a place
_LOCALITIES = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of", "on top of")
_PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
# Locality -> axis, and the sign of the distance from the first to the second box. "on top of" has no rule and gets 0, as officially.
_SIDES = {"on the right of": (0, -1), "on the left of": (0, 1), "on the bottom of": (1, -1), "on the top of": (1, 1)}
_NEAR, _OVERLAP = 150, 0.1  # pixels; intersection over union
_PERSONS = ("girl", "boy", "man", "woman")


@functools.cache
def language() -> Callable[[str], Any]:
    """spaCy's English pipeline. SuiteError when it is not installed."""
    try:
        import spacy

        return spacy.load(MODEL)
    except (ImportError, OSError) as error:
        raise SuiteError(
            f"T2I-CompBench needs spaCy and its model {MODEL}, which find the nouns of a prompt: pip install 'xomni_jax[compbench]', "
            f"then python -m spacy download {MODEL}"
        ) from error


def read_prompt(prompt: str, doc: Any, measures: Sequence[str], complex: bool) -> dict[str, Any]:
    """Fields of a prompt: "phrases" for "yes", "locality" and "nouns" (two, or none) for "objects", "text" for "similarity"."""
    phrases = [chunk.text for chunk in doc.noun_chunks if chunk.text not in _NO_OBJECT][:_MOST_PHRASES] if "yes" in measures else []
    nouns = (objects_around(doc) if complex else outer_nouns(doc)) if "objects" in measures else []
    text = " ".join(t.text for t in doc if t.pos_ != "ADJ") if complex else prompt
    locality = next((words for words in _LOCALITIES if words in prompt), "")
    return {"phrases": phrases, "locality": locality, "nouns": nouns, "text": text}


def outer_nouns(doc: Any) -> list[str]:
    """The first and the last noun, which can be the same; none where there is no noun."""
    nouns = [token.text for token in doc if token.pos_ == "NOUN"]
    return [nouns[0], nouns[-1]] if nouns else []


def objects_around(doc: Any) -> list[str]:
    """The nouns before and after the prepositions of a prompt; none unless there are two."""
    tokens, found = list(doc), []
    for i in range(len(tokens)):
        length = next((k for k in (3, 2, 1) if " ".join(t.text for t in tokens[i : i + k]) in _PREPOSITIONS), 0)
        if not length:
            continue
        found += [t.text for t in reversed(tokens[:i]) if t.pos_ in ("NOUN", "PROPN")][:1]
        after = tokens[i + length :]
        names = [a.text for a, b in zip(after, after[1:]) if a.pos_ == "PROPN" and b.pos_ != "PROPN"]
        found += ([t.text for t in after if t.pos_ == "NOUN"] or names)[:1]
    return found if len(found) == 2 else []


def placed(locality: str, nouns: Sequence[str], objects: Sequence[Mapping[str, Any]]) -> float:
    """Half for the confidence in both objects, half for their position; 0 for a sum below one half, so for one object alone."""
    named = ["person" if noun in _PERSONS else noun for noun in nouns]
    found = [next((o for o in objects if o["name"] == name), None) for name in named]
    if not found or None in found:
        return 0.0
    first, second = found
    score = 0.25 * first["score"] + 0.25 * second["score"] + position(locality, first["box"], second["box"]) / 2
    return score if score >= 0.5 else 0.0


def position(locality: str, a: Sequence[float], b: Sequence[float]) -> float:
    """How well box a stands to box b as the locality says, 0 to 1. y grows down."""
    distance = [(b[i] + b[i + 2]) / 2 - (a[i] + a[i + 2]) / 2 for i in (0, 1)]
    if locality in ("next to", "on side of", "near"):
        if min(map(abs, distance)) < _NEAR:
            return 1.0
        return _NEAR / max(map(abs, distance))
    axis, sign = _SIDES.get(locality, (0, 0))
    if sign * distance[axis] <= 0 or abs(distance[axis]) <= abs(distance[1 - axis]):
        return 0.0
    overlap = _intersection_over_union(a, b)
    return 1.0 if overlap < _OVERLAP else _OVERLAP / overlap


def _intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0
