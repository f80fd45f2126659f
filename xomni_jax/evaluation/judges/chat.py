"""A model behind an OpenAI-compatible chat endpoint as a judge. No reply is made up when the model does not answer."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from PIL import Image

from xomni_jax.evaluation.judges.preparation import encoded, is_skipped
from xomni_jax.evaluation.suite import JudgeUnavailable

KEY = "OPENAI_API_KEY"  # the only place a key is taken from; servers of one's own need none
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class ChatEndpoint:
    """One model at one base URL (up to and with /v1). Thread-safe.

    Args:
      timeout: seconds for one request.
      attempts: tries of a request that fails (5xx, no connection, a malformed answer); "busy" (429) is retried until the deadline.
      pause: seconds before the first retry; doubled each time.
    """

    def __init__(self, model: str, url: str, *, timeout: float = 180.0, attempts: int = 5, pause: float = _PAUSE):
        self.model, self.url, self.attempts, self._pause = model, url.rstrip("/"), attempts, pause
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait, limits = httpx.Timeout(timeout, connect=10.0), httpx.Limits(max_connections=None)
        # Requests to a local server must not go through a proxy that is configured for the internet.
        self._http = httpx.Client(headers=headers, timeout=wait, limits=limits, trust_env=url.startswith("https://"))
        self._closing = threading.Event()

    def check(self) -> None:
        """Raises JudgeUnavailable when nothing answers at the URL, or the key is refused, or the model is not served."""
        try:
            answer = self._http.get(self.url + "/models", timeout=10.0)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise JudgeUnavailable(
                f"no model answers at {self.url} ({type(error).__name__}); start the server there or give another URL"
            ) from error
        if answer.status_code in (401, 403):
            raise JudgeUnavailable(f"{self.url} refuses ({answer.status_code}); put the key into the environment variable {KEY}")
        try:
            known = [entry["id"] for entry in answer.json()["data"]] if answer.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            known = None  # an endpoint need not list its models
        if known and self.model not in known:
            raise JudgeUnavailable(f"{self.url} has no model {self.model!r}; it serves {', '.join(map(str, known[:5]))}")

    def complete(self, content: Any, max_tokens: int, deadline: float) -> str:
        """The model's reply to one user message, greedy. JudgeUnavailable after `attempts` failures or at the deadline (monotonic)."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
        reason, tries, pause = "no time was left", 0, self._pause
        while tries < self.attempts and time.monotonic() < deadline and not self._closing.is_set():
            try:
                answer = self._http.post(self.url + "/chat/completions", json=body)
                if answer.status_code == 429:
                    reason, rest = "it is busy (429)", max(_seconds(answer.headers.get("retry-after")), pause)
                elif 400 <= answer.status_code < 500:
                    raise JudgeUnavailable(f"{self.model} at {self.url} refuses ({answer.status_code}): {answer.text[:300]}")
                else:
                    return _text(answer.raise_for_status().json())
            except JudgeUnavailable:
                raise
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
                tries, reason, rest = tries + 1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", pause
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._closing.wait(max(0.0, min(rest, deadline - time.monotonic())))
        raise JudgeUnavailable(
            f"{self.model} at {self.url} gives no usable reply ({reason}; {tries} failed tries); "
            "what is judged is kept, run the command again"
        )

    def close(self) -> None:
        """End waits and free the connections."""
        self._closing.set()
        self._http.close()


class ChatJudge:
    """Asks a ChatEndpoint: the image as a data URL, then the question's instruction. `concurrency` requests are sent at a time.

    A question may list its "answers": a reply that equals one but for case, white space and full stops becomes that answer; any other
    reply is returned as it is, for the suite to count as unparsed.
    """

    def __init__(self, endpoint: ChatEndpoint, *, concurrency: int = 16, max_wait: float = 900.0):
        self._endpoint, self._max_wait = endpoint, max_wait
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self.name = endpoint.model
        self.settings: dict[str, Any] = {"model": endpoint.model, "temperature": 0}
        try:
            endpoint.check()
        except JudgeUnavailable:
            self.close()
            raise

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is a string, or None for an image that is left out."""
        deadline, submit = time.monotonic() + self._max_wait, self._threads.submit
        pairs = list(zip(images, questions, strict=True))
        # Each image is encoded once for all its questions. These tasks come first in the queue, so no reply waits for one behind it.
        urls = [{kind: submit(_data_url, p, kind) for kind in {q.get("format", "PNG") for q in asked}} for p, asked in pairs]
        tasks = [[submit(self._reply, p, q, url, deadline) for q in asked] for (p, asked), url in zip(pairs, urls)]
        try:
            return [[task.result() for task in of_image] for of_image in tasks]
        except JudgeUnavailable:
            for task in (t for of_image in tasks for t in of_image):
                task.cancel()
            raise

    def close(self) -> None:
        self._endpoint.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _reply(self, image: Image.Image, question: Mapping[str, Any], urls: Mapping[str, Future[str]], deadline: float) -> str | None:
        if is_skipped(image, question):
            return None
        url = urls[question.get("format", "PNG")].result()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question["instruction"]}]
        reply = self._endpoint.complete(content, question["max_tokens"], deadline)
        plain = reply.strip().rstrip(".!").strip().lower()
        return plain if plain in question.get("answers", ()) else reply


def _data_url(image: Image.Image, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(image, kind)).decode('ascii')}"


def _text(message: Any) -> str:
    """The text of a chat completion. ValueError for anything that is not one."""
    try:
        (choice,) = message["choices"]
        text = choice["message"]["content"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the answer is not a chat completion with one choice") from error
    if not isinstance(text, str):
        raise ValueError(f"the reply is {type(text).__name__}, not text")
    return text


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), _LONGEST_PAUSE)
    except ValueError:
        return 1.0
