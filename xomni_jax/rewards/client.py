"""The trainer's side of a reward: batches, replicas, retries, bounded waits. What has no score says so."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import MSGPACK, ProtocolError, Request

_MAX_ANSWER = 64 << 20


class RewardServiceError(ValueError):
    """No service answers at an address, or another one does. One sentence with the command that starts it."""


@dataclass(frozen=True)
class Score:
    """Outcome for one image: a value, or an error, or neither when the reward does not apply to its item."""

    value: float | None
    error: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """The image could not be scored: mask it."""
        return self.error is not None

    @property
    def applies(self) -> bool:
        """False when the item has nothing this reward judges."""
        return self.value is not None or self.failed


@dataclass
class ClientStats:
    """Counts since the client was made."""

    images: int = 0
    failed: int = 0
    requests: int = 0
    retries: int = 0
    busy: int = 0


class _Replica:
    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.rest_until = 0.0


class _Refused(Exception):
    """The service will not score this chunk however often it is asked (400, 413, other 4xx)."""


class RewardClient:
    """One scorer behind one or several URLs.

    chunk       images per request; several chunks are under way at once, one or two per replica
    timeout     seconds for one request
    max_wait    seconds for one call of score, retries and waits included; what is open then is failed
    attempts    tries of a chunk that gets errors (5xx, no connection, nonsense); "busy" (429) is bounded by max_wait alone
    poll        called about every `poll_every` seconds while score waits; may raise (pre-emption) to abandon the wait
    """

    def __init__(
        self,
        name: str,
        urls: str | Sequence[str],
        *,
        chunk: int = 32,
        timeout: float = 60.0,
        max_wait: float = 180.0,
        attempts: int = 4,
        backoff: float = 0.25,
        poll: Callable[[], None] | None = None,
        poll_every: float = 0.5,
    ):
        self.name = name
        self.stats = ClientStats()
        self._replicas = [_Replica(u) for u in ([urls] if isinstance(urls, str) else urls)]
        if not self._replicas:
            raise RewardServiceError(f"reward {name!r} has no URL; give one, such as http://127.0.0.1:8001")
        for r in self._replicas:
            if not r.url.startswith(("http://", "https://")):
                raise RewardServiceError(f"reward {name!r} has the URL {r.url!r}; it must begin with http:// or https://")
        if chunk < 1 or attempts < 1 or timeout <= 0 or max_wait <= 0:
            raise RewardServiceError(f"reward {name!r}: chunk and attempts must be at least 1, timeout and max_wait above 0")
        self.chunk, self.timeout, self.max_wait, self.attempts, self.backoff = chunk, timeout, max_wait, attempts, backoff
        self._poll, self._poll_every = poll, poll_every
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # trust_env off: a proxy meant for the outside world must not swallow requests to a neighbour.
        self._http = httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=None))
        self._chunks: queue.SimpleQueue[tuple[_Job, list[Any], list[Any], int] | None] = queue.SimpleQueue()
        self._threads = max(2, 2 * len(self._replicas))
        for n in range(self._threads):
            # Daemons: the interpreter joins those of an executor, and a process told to stop would stay until its last request times out.
            threading.Thread(target=self._work, name=f"reward-{name}-{n}", daemon=True).start()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Abandon what is under way and free the connections."""
        self._closing.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._abandon(self._chunks.get_nowait())
        for _ in range(self._threads):
            self._chunks.put(None)
        self._http.close()

    def health(self) -> list[dict[str, Any]]:
        """What /health of every replica says. RewardServiceError naming the URL when one is silent or serves something else."""
        return [self._health(r) for r in self._replicas]

    def score(self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[dict[str, Any]]) -> list[Score]:
        """One Score per image (uint8 [Y, X, 3], a PIL image, or encoded bytes). Never raises for a failing service."""
        return self.wait(self.score_async(images, items))

    def score_async(self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[dict[str, Any]]) -> Future[list[Score]]:
        """The same in the background, to overlap with the next decode; `wait` collects it."""
        if len(images) != len(items):
            raise ValueError(f"reward {self.name!r} got {len(images)} images and {len(items)} items; give one item per image")
        if self._closing.is_set():
            raise ValueError(f"the client of reward {self.name!r} is closed")
        job = _Job(len(images), time.monotonic() + self.max_wait)
        job.done.set_running_or_notify_cancel()
        starts = range(0, len(images), self.chunk)
        job.open_chunks = len(starts)
        for start in starts:
            end = start + self.chunk
            self._chunks.put((job, list(images[start:end]), list(items[start:end]), start))
        if not images:
            job.done.set_result([])
        return job.done

    def wait(self, future: Future[list[Score]], poll: Callable[[], None] | None = None) -> list[Score]:
        """The result of score_async, calling `poll` (or the client's) while waiting."""
        poll = poll or self._poll
        while True:
            try:
                return future.result(self._poll_every if poll else None)
            except TimeoutError:
                poll()

    def _work(self) -> None:
        """A thread's life: chunk after chunk."""
        while (task := self._chunks.get()) is not None:
            if self._closing.is_set():
                self._abandon(task)
            else:
                self._run_chunk(*task)

    @staticmethod
    def _abandon(task: tuple[_Job, list[Any], list[Any], int] | None) -> None:
        """A chunk that closing has left unsent: its future must complete all the same."""
        if task is not None:
            job, images, _, start = task
            job.finish(start, [_CLOSED] * len(images))

    def _run_chunk(self, job: _Job, images: list[Any], items: list[dict[str, Any]], start: int) -> None:
        scores: list[Score | None] = [None] * len(images)
        encoded: dict[int, bytes] = {}
        for n, image in enumerate(images):
            try:
                encoded[n] = image if isinstance(image, bytes) else protocol.encode_image(image)
            except ValueError as error:
                scores[n] = Score(None, f"{self.name}: {error}")
        try:
            answers = self._score_chunk(list(encoded.values()), [items[n] for n in encoded], job.deadline) if encoded else []
        except Exception as error:  # noqa: BLE001 - the future must complete whatever happens
            answers = [Score(None, f"{self.name}: {type(error).__name__}: {error}")] * len(encoded)
        for n, answer in zip(encoded, answers, strict=True):
            scores[n] = answer
        with self._lock:
            self.stats.images += len(scores)
            self.stats.failed += sum(s.failed for s in scores)
        job.finish(start, scores)

    def _score_chunk(self, images: list[bytes], items: list[dict[str, Any]], deadline: float) -> list[Score]:
        """One request with retries. A chunk refused as a whole is halved, so that one bad image does not fail its neighbours."""
        request = Request(uuid.uuid4().hex, images, items)
        body = protocol.encode_request(request)
        reason, tries, pause = "no time was left", 0, self.backoff
        while tries < self.attempts and time.monotonic() < deadline and not self._closing.is_set():
            replica = self._take()
            rest = 0.0
            try:
                return self._post(replica, request, body, deadline)
            except _Busy as busy:
                reason, rest = f"{replica.url} is busy", max(busy.seconds, pause)
            except _Refused as refusal:
                if len(images) == 1:
                    return [Score(None, str(refusal))]
                half = len(images) // 2
                return [s for part in (slice(0, half), slice(half, None)) for s in self._score_chunk(images[part], items[part], deadline)]
            except (httpx.HTTPError, httpx.InvalidURL, ProtocolError, OSError) as error:
                reason, rest = f"{replica.url}: {error or type(error).__name__}", pause
                tries, pause = tries + 1, min(pause * 2, 8.0)
            finally:
                self._give_back(replica, rest)
            with self._lock:
                self.stats.retries += 1
            # Another replica may be free at once; only when all rest does this thread.
            self._closing.wait(max(0.0, min(min(r.rest_until for r in self._replicas), deadline) - time.monotonic()))
        return [Score(None, f"{self.name} could not be scored after {tries or 'no'} failed tries: {reason}")] * len(images)

    def _post(self, replica: _Replica, request: Request, body: bytes, deadline: float) -> list[Score]:
        end = min(deadline, time.monotonic() + self.timeout)
        with self._lock:
            self.stats.requests += 1
        wait = httpx.Timeout(max(end - time.monotonic(), 0.001), connect=min(5.0, self.timeout))
        with self._http.stream("POST", replica.url + "/score", content=body, headers={"Content-Type": MSGPACK}, timeout=wait) as answer:
            parts, size = [], 0
            for part in answer.iter_bytes():
                size += len(part)
                # httpx bounds the time between bytes, not the whole: a trickling answer is cut here.
                if time.monotonic() > end or size > _MAX_ANSWER:
                    raise ProtocolError("the answer was too slow or too large")
                parts.append(part)
        if answer.status_code == 429:
            with self._lock:
                self.stats.busy += 1
            raise _Busy(_seconds(answer.headers.get("retry-after")))
        if 400 <= answer.status_code < 500:
            raise _Refused(f"{replica.url} refused ({answer.status_code}): {b''.join(parts)[:300].decode('utf-8', 'replace')}")
        if answer.status_code != 200:
            raise ProtocolError(f"HTTP {answer.status_code}")
        response = protocol.decode_response(b"".join(parts), _content_type(answer), request.id, len(request.images))
        if response.scorer != self.name:
            raise ProtocolError(f"scorer {response.scorer!r} answered instead of {self.name!r}")
        return [_to_score(*row) for row in zip(response.scores, response.errors, response.details)]

    def _take(self) -> _Replica:
        """The replica that rests least, then the one with the fewest requests under way."""
        with self._lock:
            now = time.monotonic()
            best = min(self._replicas, key=lambda r: (max(r.rest_until - now, 0.0), r.in_flight))
            best.in_flight += 1
            return best

    def _give_back(self, replica: _Replica, rest: float) -> None:
        with self._lock:
            replica.in_flight -= 1
            replica.rest_until = time.monotonic() + rest if rest else 0.0

    def _health(self, replica: _Replica) -> dict[str, Any]:
        port = replica.url.rpartition(":")[2].strip("/")
        mend = f"start it with: xomni serve-reward {self.name} --port {port if port.isdigit() else 8001}"
        try:
            said = self._http.get(replica.url + "/health", timeout=5.0).raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            raise RewardServiceError(f"no reward service answers at {replica.url} ({type(error).__name__}); {mend}") from error
        if not isinstance(said, dict) or said.get("scorer") != self.name or said.get("schema") != protocol.SCHEMA:
            found = said.get("scorer") if isinstance(said, dict) else None
            raise RewardServiceError(f"{replica.url} serves {found!r}, not {self.name!r} with schema {protocol.SCHEMA}; {mend}")
        return said


_CLOSED = Score(None, "the client was closed before this image was sent")


class _Busy(Exception):
    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


class _Job:
    """Chunks of one call, put together when the last one is in."""

    def __init__(self, count: int, deadline: float):
        self.done: Future[list[Score]] = Future()
        self.deadline = deadline
        self.open_chunks = 0
        self._scores: list[Score | None] = [None] * count
        self._lock = threading.Lock()

    def finish(self, start: int, scores: list[Score]) -> None:
        """Enter a chunk's scores; the last chunk completes the future."""
        with self._lock:
            self._scores[start : start + len(scores)] = scores
            self.open_chunks -= 1
            last = self.open_chunks == 0
        if last:
            self.done.set_result(list(self._scores))


def _to_score(value: float | None, error: str | None, detail: dict[str, Any]) -> Score:
    if error is None and value is not None and not math.isfinite(value):
        error = "the service gave a score that is not finite"
    return Score(None if error is not None or value is None else float(value), error, detail)


def _content_type(answer: httpx.Response) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower()


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), 30.0)
    except ValueError:
        return 1.0
