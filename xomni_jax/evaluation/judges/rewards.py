"""Reward services as a judge: several at once, each scoring every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image


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
