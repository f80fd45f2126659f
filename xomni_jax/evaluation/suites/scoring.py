"""What suites share when they score: which characters and words of a text count, and sums of integers over records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from xomni_jax.evaluation.suite import Record

Group = Callable[[Record], str]


def ratio(records: Sequence[Record], part: str, whole: str) -> float:
    """Sum of one integer over the sum of another."""
    return sum(r[part] for r in records) / sum(r[whole] for r in records)


def mean(records: Sequence[Record], part: str) -> float:
    """Mean of one number."""
    return sum(r[part] for r in records) / len(records)


def ratios_by(records: Sequence[Record], key: str | Group, part: str, whole: str) -> dict[str, dict[str, Any]]:
    """The ratio within each value of a field (or of a function of the record): {value: {"score", "items"}}, in order of value."""
    groups = group_by(records, key)
    return {name: {"score": ratio(rows, part, whole), "items": len(rows)} for name, rows in groups.items()}


def group_by(records: Sequence[Record], key: str | Group) -> dict[str, list[Record]]:
    """Records by a field, names sorted."""
    name = (lambda r: str(r["fields"].get(key, ""))) if isinstance(key, str) else key
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    return dict(sorted(groups.items()))


def right_or_wrong(right: bool, otherwise: str, unparsed: bool = False) -> Record:
    """The record of an answer; `otherwise` is the verdict on one that is wrong."""
    return {"score": float(right), "right": int(right), "one": 1, "verdicts": ["right" if right else otherwise], "unparsed": int(unparsed)}


def share_right(records: Sequence[Record], name: str) -> dict[str, Any]:
    """The aggregate of such records: how many are right, over all of them and by category."""
    share = {name: ratio(records, "right", "one")}
    return {"headline": name, "scores": share, "categories": ratios_by(records, "category", "right", "one")}


def unparsed_notes(records: Sequence[Record], counted_as: str) -> list[str]:
    """One sentence with the number of replies that could not be read and the items they belong to; none when all could."""
    listed = [r["id"] for r in records if r["unparsed"]]
    if not listed:
        return []
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    total = sum(r["unparsed"] for r in records)
    return [f"{total} replies of {len(listed)} items could not be read and count as {counted_as}: {shown}."]


NO_TEXT = "No text recognized."
HALLUCINATION = "addCriterion"  # the OCR model's own stray word

# Everything else is deleted, not replaced by a space: "ice-cold" becomes one word. Accents outside the list go as well.
_OTHER = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9\sàâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ]")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")  # wider than what is kept above: 9FA6 to 9FFF never are left to be found


def countable(text: str) -> str:
    """The text without the characters that no scorer counts."""
    return _OTHER.sub("", text)


def without_space(text: str) -> str:
    """The text without any white space."""
    return "".join(text.split())


def is_chinese(text: str) -> bool:
    """Whether any character is Chinese, as OneIG-Bench tests it."""
    return bool(_CHINESE.search(text))


def matches(wanted: list[str] | str, found: list[str] | str) -> int:
    """Size of the multiset intersection of two lists of words, or of two strings' characters."""
    return (Counter(wanted) & Counter(found)).total()
