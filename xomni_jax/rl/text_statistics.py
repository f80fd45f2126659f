"""Statistics of the texts that readers found in a step's images, which show how a policy pleases them without writing what is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from xomni_jax.rewards.protocol import Item, Score


def text_counts(items: Sequence[Item], scores: Sequence[Score]) -> list[int]:
    """Counts over the images whose score tells the text that was read (`detail` of `compare_text`), with whole groups or parts of them.

    [all of them, those with a target more often than asked for, those whose text is wrong, and of these those whose text another image
    of their group shows, too].
    """
    # Others' scorers may tell something else under these names.
    told = [(item, score.detail) for item, score in zip(items, scores) if isinstance(score.detail.get("text"), str)]
    read = [(item, _plain(detail["text"]), detail["exact"]) for item, detail in told if "exact" in detail]
    wrong = Counter((item.get("group"), text) for item, text, exact in read if text and not exact)
    repeated = sum(_repeated(item["targets"].get("text"), text) for item, text, _ in read)
    return [len(read), repeated, wrong.total(), sum(n for n in wrong.values() if n > 1)]


def join_text_counts(counts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Metrics from the `text_counts` of all processes, chunks and readers; none where no text was read."""
    read, repeated, wrong, alike = np.sum([[0] * 4, *counts], axis=0).tolist()
    return {"text/repeated_frac": repeated / read, "text/alike_frac": alike / max(wrong, 1)} if read else {}


def _repeated(targets: Any, text: str) -> bool:
    asked = Counter(_plain(t) for t in ([targets] if isinstance(targets, str) else targets or ()) if isinstance(t, str))
    whole = "\n".join(asked.elements())
    return any(target and text.count(target) > max(n, whole.count(target)) for target, n in asked.items())


def _plain(text: str) -> str:
    """Without case and white space, which readers confuse."""
    return "".join(text.casefold().split())
