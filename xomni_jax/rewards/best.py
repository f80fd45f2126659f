"""The best of several images of one prompt, by a running reward service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xomni_jax.data.records import quoted_texts
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import Score


def score_prompt(client: RewardClient, images: Sequence[Any], prompt: str, targets: dict[str, Any] | None = None) -> list[Score]:
    """One score per image of a prompt; without `targets` the texts in double quotes are what readers of text look for."""
    targets = targets or ({"text": texts} if (texts := quoted_texts(prompt)) else {})
    item = {"prompt": prompt, "targets": targets, "group": "1"}
    return client.score([np.asarray(image) for image in images], [item] * len(images))


def best_first(scores: Sequence[Score]) -> list[int]:
    """Numbers of the images, the highest value first; equal ones in their order, those without a value last."""
    return sorted(range(len(scores)), key=lambda i: (scores[i].value is None, -(scores[i].value or 0.0)))
