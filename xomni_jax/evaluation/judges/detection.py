"""GenEval's judge behind HTTP: the scoring service `detector` (rewards/services/detector.py), torch in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from xomni_jax.evaluation.suite import JudgeUnavailable
from xomni_jax.rewards.client import RewardClient, RewardServiceError

SCORER = "detector"


class DetectorJudge:
    """One or several replicas of the service; one request per image."""

    name = SCORER

    def __init__(self, urls: Sequence[str]):
        self._client = RewardClient(SCORER, list(urls), chunk=2, timeout=300.0, max_wait=1200.0)
        try:
            versions = sorted({health.version for health in self._client.health()})
        except RewardServiceError as error:
            self._client.close()
            raise JudgeUnavailable(str(error)) from error
        if len(versions) > 1:
            self._client.close()
            raise JudgeUnavailable(f"the replicas of the detector run different models ({', '.join(versions)}); start them alike")
        self.settings: dict[str, Any] = {"version": versions[0]}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is {class: [{"box", "score", "color"}]}."""
        asked = [(n, q) for n, of_image in enumerate(questions) for q in of_image]
        items = [{"prompt": "", "targets": {"detect": question}} for _, question in asked]
        scores = self._client.score([images[n] for n, _ in asked], items)
        replies: list[list[Any]] = [[] for _ in images]
        for (n, _), score in zip(asked, scores, strict=True):
            if score.failed or "detections" not in score.detail:
                raise JudgeUnavailable(f"the detector did not judge an image: {score.error or 'it sent no detections'}")
            replies[n].append(score.detail["detections"])
        return replies

    def close(self) -> None:
        """See Judge."""
        self._client.close()
