"""Chat models that see images, as judges: behind an OpenAI-compatible endpoint, or in this process."""

from __future__ import annotations

from xomni_jax.rewards.chat.messages import ChatModel, ChatUnavailable


def is_endpoint(spec: str) -> bool:
    """Whether `spec` is MODEL@URL."""
    model, _, url = spec.rpartition("@")
    return bool(model) and url.startswith(("http://", "https://"))


def open_model(
    spec: str, *, device: str = "", batch: int = 1, concurrency: int = 16, timeout: float = 180.0, max_wait: float = 900.0
) -> ChatModel:
    """The chat model MODEL@URL, or that in a directory in the layout of transformers.

    Args:
      device, batch: of a model in this process: where torch runs it, and how many questions it is asked at a time.
      concurrency, timeout, max_wait: of an endpoint: requests at a time, seconds for one, and for one reply with all retries.

    Raises:
      ServiceError: the directory holds no such model, or a package is not installed.
      ChatUnavailable: the endpoint does not answer.
    """
    if not is_endpoint(spec):
        from xomni_jax.rewards.chat.local import LocalModel

        return LocalModel(spec, device, batch)
    from xomni_jax.rewards.chat.endpoint import ChatEndpoint

    name, _, url = spec.rpartition("@")
    endpoint = ChatEndpoint(name, url, concurrency=concurrency, timeout=timeout, max_wait=max_wait)
    try:
        endpoint.check()
    except ChatUnavailable:
        endpoint.close()
        raise
    return endpoint
