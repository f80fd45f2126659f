"""Scoring services behind HTTP as judges: GenEval's detector, and the reward services that RL trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from xomni_jax.evaluation.suite import JudgeUnavailable


class Client(Protocol):
    """The part of `rewards.client.RewardClient` that is used here."""

    def score_async(self, images: Sequence[Any], items: Sequence[dict[str, Any]]) -> Any:
        """Begins to score: one item {"prompt", "targets"} per image."""
        ...

    def wait(self, future: Any) -> Sequence[Any]:
        """The scores, each with `value`, `error` and `detail`."""
        ...


class RewardsJudge:
    """Asks every client about every image. A service that fails on an image leaves "value" None: it is for the study to judge how many may.

    Args:
      clients: role -> client. versions: role -> version of the service, part of the result.
    """

    name = "reward services"
    batch = 16  # items in one call

    def __init__(self, clients: Mapping[str, Client], versions: Mapping[str, str]):
        self._clients = clients
        self.settings: dict[str, Any] = {"versions": {role: versions.get(role, "") for role in sorted(clients)}}

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a question is {"prompt", "targets"}, a reply role -> {"value", "error", "detail"}."""
        arrays, items = [np.asarray(image) for image in images], [item for (item,) in questions]
        futures = {role: client.score_async(arrays, items) for role, client in self._clients.items()}
        scores = {role: self._clients[role].wait(future) for role, future in futures.items()}
        told = lambda score: {"value": score.value, "error": score.error, "detail": dict(score.detail)}  # noqa: E731
        return [[{role: told(of_role[i]) for role, of_role in scores.items()}] for i in range(len(images))]

    def close(self) -> None:
        """See Judge; the clients belong to who made them."""


class DetectorJudge:
    """GenEval's judge: one or several replicas of the service `detector` (rewards/services/detector.py); one request per image."""

    name = "detector"

    def __init__(self, urls: Sequence[str]):
        from xomni_jax.rewards.client import RewardClient, RewardServiceError

        self._client = RewardClient("detector", list(urls), chunk=2, timeout=300.0, max_wait=1200.0)
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
        self._client.close()
