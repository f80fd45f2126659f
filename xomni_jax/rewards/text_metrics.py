"""How well a recognised text matches the wanted one: pure functions of two strings, all in [0, 1].

`target` is what the prompt asked for, `text` what a recogniser read. X-Omni (arXiv 2507.22058) uses an OCR reward but does not
publish its formula; the substring form is FlowGRPO's, the edit distance GOT-OCR2.0's, the recall LongText-Bench's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

SHORT_TEXT = 20  # up to this many characters order and junk matter; in longer text the order of blocks is arbitrary
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_UNWANTED = re.compile(r"[^\w\s]|_")  # \w keeps letters with accents, digits and CJK


def normalise(text: str) -> str:
    """Lower case without any white space: how texts are compared."""
    return "".join(text.lower().split())


def is_exact(targets: str | Sequence[str], text: str) -> bool:
    """Whether the text equals the target but for case and spaces; with several targets, holds each of them and nothing else."""
    wanted, found = [normalise(t) for t in _as_list(targets)], normalise(text)
    return all(t in found for t in wanted) and len(found) == sum(map(len, wanted))


def substring_or_edit(target: str, text: str) -> float:
    """1 when the target occurs anywhere in the text, else 1 - min(edit distance, |target|) / |target| (FlowGRPO).

    Repetition of the target and junk around it cost nothing.
    """
    wanted, found = _wanted(target), normalise(text)
    distance = 0 if wanted in found else min(Levenshtein.distance(found, wanted), len(wanted))
    return 1 - distance / len(wanted)


def edit_similarity(target: str, text: str) -> float:
    """1 - edit distance / length of the longer string (GOT-OCR2.0). Junk costs in proportion to its length."""
    wanted, found = _wanted(target), normalise(text)
    return 1 - Levenshtein.distance(found, wanted) / max(len(wanted), len(found))


def recall(target: str, text: str) -> tuple[int, int]:
    """(matched, wanted) words, or characters of a Chinese target, as multisets: order does not count (LongText-Bench)."""
    wanted, found = _units(target, bool(_CJK.search(target))), _units(text, bool(_CJK.search(target)))
    return sum((Counter(wanted) & Counter(found)).values()), len(wanted)


def recall_with_length_penalty(target: str, text: str) -> float:
    """Recall times min(1, wanted units / found units): independent of order, but repeating or padding the text does not pay."""
    _wanted(target)
    matched, wanted = recall(target, text)
    found = len(_units(text, bool(_CJK.search(target))))
    return matched / max(wanted, 1) * min(1.0, wanted / max(found, 1))


def automatic(target: str, text: str) -> float:
    """Edit similarity up to `SHORT_TEXT` characters, recall with length penalty above."""
    return (edit_similarity if len(normalise(target)) <= SHORT_TEXT else recall_with_length_penalty)(target, text)


FORMULAS: dict[str, Callable[[str, str], float]] = {
    "auto": automatic,
    "edit": edit_similarity,
    "substring": substring_or_edit,
    "recall": recall_with_length_penalty,
}


def text_score(targets: str | Sequence[str], text: str, formula: str = "auto") -> float:
    """A recognised text against one target, or the mean over several. `formula`: a name in FORMULAS. ValueError for an empty target.

    With several targets and "auto", each is searched inside the whole text and the mean is multiplied by min(1, |targets| / |text|).
    Plain edit similarity would count the other targets as junk: writing one of two words would score more than both.
    """
    wanted = _as_list(targets)
    if len(wanted) == 1 or formula != "auto":
        return sum(FORMULAS[formula](t, text) for t in wanted) / len(wanted)
    found, length = normalise(text), sum(len(_wanted(t)) for t in wanted)
    inside = sum(1 - min(window_distance(normalise(t), found), len(normalise(t))) / len(normalise(t)) for t in wanted)
    return inside / len(wanted) * min(1.0, length / max(len(found), 1))


def compare_text(targets: str | Sequence[str], text: str, formula: str = "auto") -> tuple[float, dict[str, Any]]:
    """`text_score` of a recognised text, and the detail of a score: text, exact (see `is_exact`), no_text."""
    return text_score(targets, text, formula), {"text": text, "exact": is_exact(targets, text), "no_text": not text.strip()}


def window_distance(target: str, text: str) -> int:
    """Smallest edit distance between the target and any stretch of the text (Sellers' algorithm); 0 when it is a substring."""
    row = [0] * (len(text) + 1)  # a match may begin anywhere in the text for free ...
    for i, wanted in enumerate(target, 1):
        last, row[0] = row[0], i
        for j, found in enumerate(text, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (wanted != found))
    return min(row)  # ... and end anywhere


def _as_list(targets: str | Sequence[str]) -> list[str]:
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted or not all(isinstance(t, str) for t in wanted):
        raise ValueError(f"text targets must be one or more strings, got {targets!r}")
    return wanted


def _wanted(target: str) -> str:
    wanted = normalise(target)
    if not wanted:
        raise ValueError("a text target is empty; leave the target out when no text is wanted")
    return wanted


def _units(text: str, characters: bool) -> list[str]:
    words = _UNWANTED.sub("", text.lower()).split()
    return list("".join(words)) if characters else words
