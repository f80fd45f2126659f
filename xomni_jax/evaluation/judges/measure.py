"""A scoring service as a judge, for suites whose published judge is neither a chat model nor GenEval's detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from xomni_jax.evaluation.judges.preparation import as_shown, is_skipped
from xomni_jax.evaluation.suite import Judge, JudgeUnavailable

# What a question may ask for -> what the reply must be. "value" is the score of the service, everything else a field of its detail.
REPLIES = {
    "yes": "the probability that the answer to the prompt is yes, as its value",
    "similarity": "the similarity of the image and the prompt, as its value",
    "style": '"style", the largest similarities to images of the style that the prompt names, by two encoders: [CSD, OneIG-StyleEncoder]',
    "embedding": '"embedding", a list of numbers',
    "objects": '"objects", a list of {"name", "score", "box": [x1, y1, x2, y2]}, the most confident first',
}


class MeasureJudge(Judge):
    """Asks the service `name` at one or several URLs: an item's prompt is that of the question, targets["measure"] is one of REPLIES."""

    def __init__(self, name: str, urls: Sequence[str]):
        from xomni_jax.rewards.client import RewardClient, RewardServiceError

        self.name, self.concurrency = name, 4 * len(urls)
        try:
            self._client = RewardClient(name, list(urls), chunk=8, timeout=300.0, max_wait=1200.0)
            self.settings: dict[str, Any] = {"version": self._client.versions()}
        except RewardServiceError as error:
            raise JudgeUnavailable(str(error)) from error

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is what REPLIES says, or None for an image that is left out."""
        replies: list[list[Any]] = [[None] * len(of_image) for of_image in questions]
        asked = [(n, k, q) for n, of_image in enumerate(questions) for k, q in enumerate(of_image) if not is_skipped(images[n], q)]
        items = [{"prompt": q["prompt"], "targets": {"measure": q["measure"]}} for _, _, q in asked]
        scores = self._client.score([as_shown(images[n], q) for n, _, q in asked], items)
        for (n, k, question), score in zip(asked, scores, strict=True):
            kind = question["measure"]
            reply = score.value if kind in ("yes", "similarity") else score.detail.get(kind)
            if score.failed or not fits(kind, reply):
                what = score.error or f"it was asked for {kind!r} and must give {REPLIES[kind]}"
                raise JudgeUnavailable(f"{self.name} did not judge an image: {what}")
            replies[n][k] = reply
        return replies

    def close(self) -> None:
        self._client.close()


def fits(kind: str, reply: Any) -> bool:
    """Whether a reply is what REPLIES says."""
    if kind == "objects":
        sound = lambda o: isinstance(o.get("name"), str) and _numbers([o.get("score")]) and _numbers(o.get("box"), 4)
        return isinstance(reply, list) and all(isinstance(o, dict) and sound(o) for o in reply)
    return _numbers(reply, {"style": 2}.get(kind)) if kind in ("style", "embedding") else _numbers([reply])


def _numbers(values: Any, count: int | None = None) -> bool:
    numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    return numbers and len(values) == count if count else numbers and bool(values)
