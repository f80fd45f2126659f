"""A chat model behind an OpenAI-compatible endpoint, such as vLLM."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from xomni_jax.rewards.chat.messages import ChatRefused, ChatUnavailable, Question
from xomni_jax.rewards.chat.replies import Completion, Unreadable, read_completion, read_first_tokens

KEY = "OPENAI_API_KEY"  # the only place a key is taken from; servers of one's own need none
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LIKELIEST = 20  # tokens whose probabilities are asked for: the most that OpenAI's interface allows
T = TypeVar("T")


class ChatEndpoint:
    """One model at one base URL (up to and with /v1). Thread-safe. See ChatModel.

    Args:
      concurrency: requests at a time of `complete_all` and `first_tokens`.
      timeout: seconds for one request. max_wait: seconds for one reply, retries and waits included.
      attempts: tries of a request that fails (5xx, no connection, a malformed answer); "busy" (429) is retried up to `max_wait`.
      pause: seconds before the first retry; doubled each time.
    """

    model_hash = ""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        concurrency: int = 16,
        timeout: float = 180.0,
        max_wait: float = 900.0,
        attempts: int = 5,
        pause: float = _PAUSE,
    ):
        self.settings: Mapping[str, str] = {}
        self.name, self.url, self.attempts, self._max_wait, self._pause = name, url.rstrip("/"), attempts, max_wait, pause
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        patience, limits = httpx.Timeout(timeout, connect=10.0), httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Requests to a local server must not go through a proxy that is configured for the internet.
        self._http = httpx.Client(headers=headers, timeout=patience, limits=limits, trust_env=url.startswith("https://"))
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="chat")
        self._closing = threading.Event()

    def check(self) -> None:
        """Raises ChatUnavailable when nothing answers at the URL, or the key is refused, or the model is not served."""
        try:
            answer = self._http.get(self.url + "/models", timeout=10.0)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ChatUnavailable(
                f"no model answers at {self.url} ({type(error).__name__}); start the server there or give another URL"
            ) from error
        if answer.status_code in (401, 403):
            raise ChatUnavailable(f"{self.url} refuses ({answer.status_code}); put the key into the environment variable {KEY}")
        try:
            known = [entry["id"] for entry in answer.json()["data"]] if answer.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            known = None  # an endpoint need not list its models
        if known and self.name not in known:
            raise ChatUnavailable(f"{self.url} has no model {self.name!r}; it serves {', '.join(map(str, known[:5]))}")

    def complete(self, question: Question, max_tokens: int) -> Completion:
        """See ChatModel."""
        return self._ask(question, {"max_tokens": max_tokens}, read_completion)

    def complete_all(self, questions: Sequence[Question], max_tokens: int) -> list[Completion | ChatUnavailable | Unreadable]:
        """See ChatModel."""
        return self._each(lambda question: self.complete(question, max_tokens), questions)

    def first_tokens(self, questions: Sequence[Question], words: Sequence[str]) -> list[dict[str, float] | ChatUnavailable | Unreadable]:
        """See ChatModel. Only the 20 likeliest tokens are known, whatever the words."""
        fields = {"max_tokens": 1, "logprobs": True, "top_logprobs": _LIKELIEST}
        return self._each(lambda question: self._ask(question, fields, read_first_tokens), questions)

    def close(self) -> None:
        """Ends waits and frees the connections."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _each(self, ask: Callable[[Question], T], questions: Sequence[Question]) -> list[T | ChatUnavailable | Unreadable]:
        def one(question: Question) -> T | ChatUnavailable | Unreadable:
            try:
                return ask(question)
            except (ChatUnavailable, Unreadable) as error:
                return error

        return list(self._threads.map(one, questions))

    def _ask(self, question: Question, fields: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the reply, whose ValueError counts as a failed try."""
        body = self._body(question, fields)
        reason, tries, pause, deadline = "no time was left", 0, self._pause, time.monotonic() + self._max_wait
        while tries < self.attempts and time.monotonic() < deadline and not self._closing.is_set():
            try:
                answer = self._http.post(self.url + "/chat/completions", content=body)
                if answer.status_code == 429:
                    reason, rest = "it is busy (429)", max(_seconds(answer.headers.get("retry-after")), pause)
                elif 400 <= answer.status_code < 500:
                    raise ChatRefused(f"{self.name} at {self.url} refuses ({answer.status_code}): {answer.text[:300]}")
                else:
                    return read(answer.raise_for_status().json())
            except (ChatUnavailable, Unreadable):
                raise
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
                tries, reason, rest = tries + 1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", pause
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._closing.wait(max(0.0, min(rest, deadline - time.monotonic())))
        raise ChatUnavailable(f"{self.name} at {self.url} gives no usable reply ({reason}; {tries} failed tries)")

    def _body(self, question: Question, fields: Mapping[str, Any]) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": "@"}}] * len(question.images) + [{"type": "text", "text": question.text}]
        body = json.dumps({"model": self.name, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}).encode()
        # Images are put in afterwards: escaping megabytes of base64 would take most of the time.
        parts = body.split(b'{"url": "@"}', len(question.images))
        urls = [b'{"url": "' + image.url + b'"}' for image in question.images]
        return b"".join(part for pair in zip(parts, [*urls, b""], strict=True) for part in pair)


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), _LONGEST_PAUSE)
    except ValueError:
        return 1.0
