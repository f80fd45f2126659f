"""How well a recognised text matches the wanted one: pure functions of two strings, all in [0, 1].

`target` is what the prompt asked for, `text` what a recogniser read. Both are folded first, so that only differences that a reader
sees count; the benchmarks of evaluation/suites clean texts by their own published rules instead. X-Omni (arXiv 2507.22058) uses an
OCR reward but does not publish its formula; the substring form is FlowGRPO's, the edit distance GOT-OCR2.0's, the recall
LongText-Bench's.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

SHORT_TEXT = 20  # up to this many characters order and junk matter; in longer text the order of blocks is arbitrary
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_UNWANTED = re.compile(r"[^\w\s]|_")  # \w keeps letters with accents, digits and CJK
# Before NFKC, which would turn some of these into others: the non-breaking hyphen, the double prime, the acute accent.
_ASCII = str.maketrans(
    dict.fromkeys("‘’‚‛‹›′‵´`", "'") | dict.fromkeys("“”„‟«»″‶〝〞〟", '"') | dict.fromkeys("‐‑‒–—―−⁃﹘︱︲", "-") | {"〜": "~"}
)

_MOST_TRIED = 10_000  # sets of parts that are left; a request chooses both texts and could ask for exponentially many


def fold(text: str) -> str:
    """One form for what looks alike: NFKC (full width, ligatures, ellipsis, accents), ASCII quotes and dashes, no case.

    Characters without a glyph, such as a soft hyphen, are left out.
    """
    plain = unicodedata.normalize("NFKC", text.translate(_ASCII)).casefold()
    # Again: folding the case may take a letter and its accent apart.
    return "".join(c for c in unicodedata.normalize("NFKC", plain) if unicodedata.category(c) != "Cf")


def normalise(text: str) -> str:
    """Folded, without any white space: how texts are compared."""
    return "".join(fold(text).split())


def is_exact(targets: str | Sequence[str], text: str) -> bool:
    """Whether the text consists of the targets, each once and in any order, and of nothing else."""
    return _consists_of(normalise(text), [normalise(t) for t in _as_list(targets)])


def _consists_of(text: str, parts: list[str]) -> bool:
    """Whether the parts in some order are the text; False where too many orders would have to be tried."""
    if sorted(text) != sorted("".join(parts)):
        return False
    tried, begun = set(), [(0, tuple(sorted(parts)))]
    while begun and len(tried) < _MOST_TRIED:
        start, left = begun.pop()
        if start == len(text):
            return True
        if left not in tried:
            tried.add(left)
            fitting = (part for part in dict.fromkeys(left) if text.startswith(part, start))
            begun += [(start + len(part), left[: left.index(part)] + left[left.index(part) + 1 :]) for part in fitting]
    return False


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
    wanted, found = (_units(t, bool(_CJK.search(target))) for t in (target, text))
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
    """A recognised text against one target or several. `formula`: a name in FORMULAS. ValueError for an empty target.

    Several targets with "recall" are one list of words. With the other formulas every target is searched inside the text, where each
    place serves one target, and the mean of 1 - edit distance / |target| counts; but for "substring", times min(1, |targets| / |text|).
    Similarity to the whole text would count the other targets as junk: writing one of two words would score more than both.
    """
    wanted = _as_list(targets)
    if len(wanted) == 1 or formula == "recall":
        return FORMULAS[formula](" ".join(wanted), text)
    sought, found = [_wanted(t) for t in wanted], normalise(text)
    inside = sum(1 - distance / len(t) for t, distance in zip(sought, place_distances(sought, found))) / len(sought)
    return inside if formula == "substring" else inside * min(1.0, sum(map(len, sought)) / max(len(found), 1))


def compare_text(targets: str | Sequence[str], text: str, formula: str = "auto") -> tuple[float, dict[str, Any]]:
    """`text_score` of a recognised text, and the detail of a score: text, exact (see `is_exact`), no_text."""
    return text_score(targets, text, formula), {"text": text, "exact": is_exact(targets, text), "no_text": not text.strip()}


def place_distances(targets: Sequence[str], text: str) -> list[int]:
    """Edit distance of each target to a stretch of the text of its own. Longer targets choose first."""
    if _consists_of(text, list(targets)):  # a choice of the longer ones may spoil the only arrangement that fits
        return [0] * len(targets)
    distances, pieces = [0] * len(targets), [text]
    for n in sorted(range(len(targets)), key=lambda n: -len(targets[n])):
        places = [best_place(targets[n], piece) for piece in pieces]
        at = min(range(len(pieces)), key=lambda i: places[i][0])
        distances[n], start, end = places[at]
        pieces[at : at + 1] = [pieces[at][:start], pieces[at][end:]]
    return distances


def best_place(target: str, text: str) -> tuple[int, int, int]:
    """(edit distance, start, end) of the stretch of the text that is nearest to the target (Sellers' algorithm)."""
    row = [(0, -j) for j in range(len(text) + 1)]  # distance and minus the start of a match, which may begin anywhere for free
    for i, wanted in enumerate(target, 1):
        last, row[0] = row[0], (i, 0)
        for j, found in enumerate(text, 1):
            options = ((row[j][0] + 1, row[j][1]), (row[j - 1][0] + 1, row[j - 1][1]), (last[0] + (wanted != found), last[1]))
            last, row[j] = row[j], min(options)
    end = min(range(len(row)), key=lambda j: row[j][0])
    return row[end][0], -row[end][1], end


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
    words = _UNWANTED.sub("", fold(text)).split()
    return list("".join(words)) if characters else words
