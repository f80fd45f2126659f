"""What the scorers that ask a chat model share: their options, and opening the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from xomni_jax.rewards.chat import open_model
from xomni_jax.rewards.chat.messages import ChatUnavailable, EncodedImage, encoded
from xomni_jax.rewards.scorer import Scorer, ServiceError, Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class ChatOptions:
    """The model and how it is asked.

    Attributes:
      model: NAME@URL of an OpenAI-compatible endpoint, such as Qwen/Qwen2.5-VL-32B-Instruct@http://127.0.0.1:8000/v1 of vLLM,
        or a directory with the model in the layout of transformers, which runs in this process; required.
      device: where torch runs a model of this process, such as cuda:1; without one CUDA if there is one, else the CPU.
      batch: questions at a time to a model of this process.
      concurrency: requests at a time to an endpoint.
      max_wait: seconds for one reply of an endpoint, retries included; then its image counts as not scored, or, where nothing is answered
        at all, the service as busy, so that its clients wait.
    """

    model: str = ""
    device: str = ""
    batch: int = 4
    concurrency: int = 16
    max_wait: float = 50.0


class ChatScorer(Scorer):
    """Base class of scorers that ask a chat model about images.

    Attributes:
      chat: the model.
      published: what to name where no model was given.
    """

    Options = ChatOptions
    published: str

    def __init__(self, **options: Any):
        super().__init__(**options)
        o = self.options
        if not o.model:
            raise ServiceError(f"scorer {self.name!r} needs --model NAME@URL or --model DIR, such as a local copy of {self.published}")
        if min(o.batch, o.concurrency, o.max_wait) <= 0:
            raise ServiceError(f"scorer {self.name!r}: --batch, --concurrency and --max-wait must be above 0")
        self.check()
        self.chat = open_model(o.model, device=o.device, batch=o.batch, concurrency=o.concurrency, timeout=o.max_wait, max_wait=o.max_wait)
        self.model_hash = self.chat.model_hash
        self.version = "/".join(filter(None, (self.chat.name, self.model_hash[:12], self.version)))

    def check(self) -> None:
        """Sets the version of the formula, and checks what else can be checked before a model is loaded, which takes minutes."""

    def answered(self, replies: list[T]) -> list[T]:
        """The replies of one call. Raises Unavailable when there is no answer to any question, which is not the images' fault."""
        if replies and all(type(reply) is ChatUnavailable for reply in replies):
            raise Unavailable(str(replies[0]))
        return replies


def as_files(images: list[np.ndarray]) -> list[EncodedImage]:
    """Images as PNG, which loses nothing on the way to the model."""
    return [encoded(Image.fromarray(image)) for image in images]
