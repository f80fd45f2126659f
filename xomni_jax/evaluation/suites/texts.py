"""How the scorers of LongText-Bench and OneIG-Bench see a text: which characters count, what a word is, how matches are counted."""

from __future__ import annotations

import re
from collections import Counter

NO_TEXT = "No text recognized."
HALLUCINATION = "addCriterion"  # the OCR model's own stray word

# Everything else is deleted, not replaced by a space: "ice-cold" becomes one word. Accents outside the list go as well.
_OTHER = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9\sàâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ]")
_SPACE = re.compile(r"\s+")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")  # wider than what is kept above: 9FA6 to 9FFF never are left to be found


def countable(text: str) -> str:
    """The text without the characters that no scorer counts."""
    return _OTHER.sub("", text)


def collapse(text: str) -> str:
    """Runs of white space as one space, none at the ends."""
    return _SPACE.sub(" ", text).strip()


def without_space(text: str) -> str:
    """The text without any white space."""
    return _SPACE.sub("", text)


def is_chinese(text: str) -> bool:
    """Whether any character is Chinese, as OneIG-Bench tests it."""
    return bool(_CHINESE.search(text))


def matches(wanted: list[str] | str, found: list[str] | str) -> int:
    """Size of the multiset intersection of two lists of words, or of two strings' characters."""
    return (Counter(wanted) & Counter(found)).total()
