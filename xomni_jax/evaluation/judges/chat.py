"""A chat model that sees as a judge: behind an OpenAI-compatible endpoint, or in this process (`vlm.LocalModel`)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import httpx
from PIL import Image

from xomni_jax.evaluation.judges.preparation import ChatOptions, EncodedImage, encoded, is_skipped
from xomni_jax.evaluation.judges.replies import Completion, Unreadable, choose, read_completion
from xomni_jax.evaluation.suite import JudgeUnavailable, unreadable

KEY = "OPENAI_API_KEY"  # the only place a key is taken from; servers of one's own need none
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class ChatModel(Protocol):
    """What `answered` asks. `name` and `settings` are for the result file."""

    name: str
    settings: Mapping[str, Any]

    def complete(self, text: str, max_tokens: int, image: EncodedImage | None = None) -> Completion:
        """The reply to one user message, greedy.

        Raises:
          JudgeUnavailable: it does not answer.
          Unreadable: it refuses.
        """
        ...

    def close(self) -> None:
        """Frees connections or the model."""


def answered(
    model: ChatModel, text: str, max_tokens: int, room: int, image: EncodedImage | None = None, answers: Sequence[str] = ()
) -> str:
    """The answer of a model, without its thinking; one of `answers` if there are some.

    A reply that was cut is asked for again with `room` more tokens. Text of a model that turns out not to think is then taken as it
    was cut, as the official scorers do.

    Raises:
      JudgeUnavailable: the model does not answer.
      Unreadable: it refuses, ends within its thinking, or gives none of `answers`.
    """
    reply = model.complete(text, max_tokens, image)
    if reply.cut and not (answers and reply.text and choose(reply.text, answers)):
        longer = model.complete(text, max_tokens + room, image)
        reply = longer if longer.thought or answers or reply.text is None else reply
    if reply.text is None:
        used = f"the {max_tokens + room} tokens were used up by thinking, raise --thinking-tokens" if reply.cut else "it only thought"
        raise Unreadable(f"no answer: {used}")
    if not answers:
        return reply.text
    if (chosen := choose(reply.text, answers)) is None:
        raise Unreadable(f"none of {', '.join(answers)}: {reply.text[:200]}")
    return chosen


class ChatEndpoint:
    """One model at one base URL (up to and with /v1). Thread-safe.

    Args:
      timeout: seconds for one request. max_wait: seconds for one reply, retries and waits included.
      attempts: tries of a request that fails (5xx, no connection, a malformed answer); "busy" (429) is retried up to `max_wait`.
      pause: seconds before the first retry; doubled each time.
    """

    def __init__(self, name: str, url: str, *, timeout: float = 180.0, max_wait: float = 900.0, attempts: int = 5, pause: float = _PAUSE):
        self.settings: Mapping[str, Any] = {}
        self.name, self.url, self.attempts, self._max_wait, self._pause = name, url.rstrip("/"), attempts, max_wait, pause
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        patience, limits = httpx.Timeout(timeout, connect=10.0), httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Requests to a local server must not go through a proxy that is configured for the internet.
        self._http = httpx.Client(headers=headers, timeout=patience, limits=limits, trust_env=url.startswith("https://"))
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
        if known and self.name not in known:
            raise JudgeUnavailable(f"{self.url} has no model {self.name!r}; it serves {', '.join(map(str, known[:5]))}")

    def complete(self, text: str, max_tokens: int, image: EncodedImage | None = None) -> Completion:
        """See ChatModel."""
        content = [{"type": "image_url", "image_url": {"url": "@"}}] * (image is not None) + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()
        if image is not None:  # put in afterwards: escaping megabytes of base64 would take most of the time
            before, _, after = body.partition(b'{"url": "@"}')
            body = before + b'{"url": "' + image.url + b'"}' + after
        reason, tries, pause, deadline = "no time was left", 0, self._pause, time.monotonic() + self._max_wait
        while tries < self.attempts and time.monotonic() < deadline and not self._closing.is_set():
            try:
                answer = self._http.post(self.url + "/chat/completions", content=body)
                if answer.status_code == 429:
                    reason, rest = "it is busy (429)", max(_seconds(answer.headers.get("retry-after")), pause)
                elif 400 <= answer.status_code < 500:
                    raise JudgeUnavailable(f"{self.name} at {self.url} refuses ({answer.status_code}): {answer.text[:300]}")
                else:
                    return read_completion(answer.raise_for_status().json())
            except (JudgeUnavailable, Unreadable):
                raise
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
                tries, reason, rest = tries + 1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", pause
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._closing.wait(max(0.0, min(rest, deadline - time.monotonic())))
        raise JudgeUnavailable(
            f"{self.name} at {self.url} gives no usable reply ({reason}; {tries} failed tries); "
            "what is judged is kept, run the command again"
        )

    def close(self) -> None:
        """Ends waits and frees the connections."""
        self._closing.set()
        self._http.close()


class ChatJudge:
    """Asks a chat model: the image, then the question's instruction. See Judge.

    A question may list the "answers" to choose from. A reply that cannot be read is {"unreadable": why}.
    """

    def __init__(self, model: ChatModel, options: ChatOptions = ChatOptions()):
        self._model, self._options, self.concurrency = model, options, options.concurrency
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="judge")
        self.name = model.name
        self.settings: dict[str, Any] = {"model": model.name, "temperature": 0, **model.settings}
        if options.image_format:
            self.settings["format"] = options.image_format

    def ask(self, images: Sequence[Image.Image | None], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """See Judge; a reply is a string, or None for an image that is left out."""
        submit = self._threads.submit
        tasks = []
        for image, asked in zip(images, questions, strict=True):
            # Each image is encoded once for all its questions. This task comes first in the queue, so no reply waits for one behind it.
            files = {kind: submit(encoded, image, kind) for kind in set(map(self._kind, asked))} if image else {}
            tasks.append([submit(self._reply, image, question, files) for question in asked])
        try:
            return [[task.result() for task in of_image] for of_image in tasks]
        except JudgeUnavailable:
            started = [task for of_image in tasks for task in of_image if not task.cancel()]
            wait(started)  # so that nothing is asked any more when this returns
            raise

    def close(self) -> None:
        self._model.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _kind(self, question: Mapping[str, Any]) -> str:
        return self._options.image_format or question.get("format", "PNG")

    def _reply(self, image: Image.Image | None, question: Mapping[str, Any], files: Mapping[str, Any]) -> Any:
        if image and is_skipped(image, question):
            return None
        file = files[self._kind(question)].result() if image else None
        answers = question.get("answers", ())
        try:
            return answered(self._model, question["instruction"], question["max_tokens"], self._options.thinking_tokens, file, answers)
        except Unreadable as error:
            return unreadable(str(error))


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), _LONGEST_PAUSE)
    except ValueError:
        return 1.0
