"""The trainer's side of a reward: requests in chunks over several replicas, with retries and bounded waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import MSGPACK, SCHEMA, Health, Item, ProtocolError, Request, Score

_MAX_ANSWER = 64 << 20
_CLOSED = Score(None, "the client was closed before this image was scored")
T = TypeVar("T")


class RewardServiceError(ValueError):
    """No service answers at an address, or another one does. One sentence with the command that starts it."""


@dataclass
class _Replica:
    url: str
    in_flight: int = 0
    rest_until: float = 0.0  # monotonic time before which it gets no request


class _Busy(Exception):
    """The service has no room now (429); the argument is the number of seconds after which to ask again."""


class _Refused(Exception):
    """The service will not score this chunk however often it is asked (400, 413, other 4xx)."""


class RewardClient:
    """One scorer behind one or several URLs. All requests run on an event loop in a thread of the client's own.

    Args:
      name: of the scorer that must answer.
      urls: its replicas.
      chunk: images per request; two requests per replica are under way at a time.
      timeout: seconds for one request.
      max_wait: seconds for one call of `score`, retries and waits included; images without an answer by then have failed.
      attempts: tries of a chunk that meets errors (5xx, no connection, invalid answers); a busy service (429) does not count as a try.
      backoff: seconds before the first retry; doubled from try to try, at most 8.
      poll: called about every `poll_every` seconds while `score` waits; may raise (preemption) to abandon the wait.
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
        self._replicas = [_Replica(url.rstrip("/")) for url in ([urls] if isinstance(urls, str) else urls)]
        for replica in self._replicas:
            if not replica.url.startswith(("http://", "https://")):
                raise RewardServiceError(f"reward {name!r} has the URL {replica.url!r}; it must begin with http:// or https://")
        self.chunk, self.timeout, self.max_wait, self.attempts, self.backoff = chunk, timeout, max_wait, attempts, backoff
        self._poll, self._poll_every = poll, poll_every
        # trust_env off: a proxy meant for the outside world must not receive requests to a neighbour.
        wait = httpx.Timeout(timeout, connect=min(5.0, timeout))
        self._http = httpx.AsyncClient(trust_env=False, timeout=wait, limits=httpx.Limits(max_connections=None))
        self._slots = asyncio.Semaphore(max(2, 2 * len(self._replicas)))
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a process that is told to stop must not stay until its last request times out.
        threading.Thread(target=self._run, name=f"reward-{name}", daemon=True).start()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Abandon what is under way (its images fail) and free the connections."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of its replicas."""
        return tuple(replica.url for replica in self._replicas)

    def health(self) -> list[Health]:
        """State of every replica. RewardServiceError naming the URL when one does not answer or serves something else."""

        async def all_replicas() -> list[Health]:
            return await asyncio.gather(*map(self._health, self._replicas))

        return self._start(all_replicas()).result()

    def versions(self) -> str:
        """The different versions of the scorer that the replicas report, joined by ", "."""
        return ", ".join(sorted({health.version for health in self.health()}))

    def score(self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[Item]) -> list[Score]:
        """One Score per image (uint8 [Y, X, 3], a PIL image, or encoded bytes). Never raises for a failing service."""
        return self.wait(self.score_async(images, items))

    def score_async(self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[Item]) -> Future[list[Score]]:
        """`score` in the background, to overlap with other work; `wait` collects the result."""
        return self._start(self._score(list(images), list(items)))

    def wait(self, future: Future[list[Score]], poll: Callable[[], None] | None = None) -> list[Score]:
        """The result of score_async, calling `poll` (or the client's) while waiting."""
        poll = poll or self._poll
        while True:
            try:
                return future.result(self._poll_every if poll else None)
            except TimeoutError:
                poll()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise ValueError(f"the client of reward {self.name!r} is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()
        await self._loop.shutdown_default_executor()

    async def _score(self, images: list[Any], items: list[Item]) -> list[Score]:
        deadline = time.monotonic() + self.max_wait
        chunks = [slice(n, n + self.chunk) for n in range(0, len(images), self.chunk)]
        try:
            parts = await asyncio.gather(*(self._score_chunk(images[c], items[c], deadline) for c in chunks))
        except asyncio.CancelledError:  # by `close`: whoever waits gets an answer all the same
            return [_CLOSED] * len(images)
        return [score for part in parts for score in part]

    async def _score_chunk(self, images: list[Any], items: list[Item], deadline: float) -> list[Score]:
        try:
            async with self._slots:
                encoded, scores = await asyncio.to_thread(self._encode, images)
                answers = await self._request(list(encoded.values()), [items[n] for n in encoded], deadline) if encoded else []
                scores |= zip(encoded, answers)
        except Exception as error:  # noqa: BLE001 - whatever happens concerns these images alone
            scores = dict.fromkeys(range(len(images)), Score(None, f"{self.name}: {type(error).__name__}: {error}"))
        return [scores[n] for n in range(len(images))]

    def _encode(self, images: list[Any]) -> tuple[dict[int, bytes], dict[int, Score]]:
        """Files of the images that can be encoded, and failures of the others, by index."""
        encoded, failures = {}, {}
        for n, image in enumerate(images):
            try:
                encoded[n] = image if isinstance(image, bytes) else protocol.encode_image(image)
            except ValueError as error:
                failures[n] = Score(None, f"{self.name}: {error}")
        return encoded, failures

    async def _request(self, images: list[bytes], items: list[Item], deadline: float) -> list[Score]:
        """One request with retries. A chunk refused as a whole is halved, so that one bad image does not fail its neighbours."""
        request = Request(schema=SCHEMA, id=uuid.uuid4().hex, images=images, items=items)
        body = protocol.encode(request)
        reason, tries, pause = "no time was left", 0, self.backoff
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while tries < self.attempts:
                    replica = await self._free_replica()
                    try:
                        return await self._post(replica, request, body)
                    except _Busy as busy:
                        reason, rest = f"{replica.url} is busy", max(busy.args[0], pause)
                    except (httpx.HTTPError, httpx.InvalidURL, ProtocolError, OSError) as error:
                        reason, rest = f"{replica.url}: {str(error) or type(error).__name__}", pause
                        tries, pause = tries + 1, min(pause * 2, 8.0)
                    replica.rest_until = time.monotonic() + rest
        except TimeoutError:
            pass
        except _Refused as refusal:
            if len(images) == 1:
                return [Score(None, str(refusal))]
            half = len(images) // 2
            return [
                *await self._request(images[:half], items[:half], deadline),
                *await self._request(images[half:], items[half:], deadline),
            ]
        return [Score(None, f"{self.name} could not be scored after {tries or 'no'} failed tries: {reason}")] * len(images)

    async def _free_replica(self) -> _Replica:
        """The replica with the fewest requests under way among those that do not rest, once there is one."""
        await asyncio.sleep(min(r.rest_until for r in self._replicas) - time.monotonic())
        now = time.monotonic()
        return min(self._replicas, key=lambda r: (max(r.rest_until - now, 0.0), r.in_flight))

    async def _post(self, replica: _Replica, request: Request, body: bytes) -> list[Score]:
        replica.in_flight += 1
        try:
            # httpx bounds the time between bytes; this bounds the whole, also of an answer that trickles in.
            async with asyncio.timeout(self.timeout):
                status, headers, content = await self._exchange(replica.url + "/score", body)
        finally:
            replica.in_flight -= 1
        if status == 429:
            raise _Busy(_seconds(headers.get("retry-after")))
        if 400 <= status < 500:
            raise _Refused(f"{replica.url} refused ({status}): {content[:300].decode('utf-8', 'replace')}")
        if status != 200:
            raise ProtocolError(f"HTTP {status}")
        scores = protocol.read_response(content, protocol.media_type(headers), request.id, self.name, len(request.images))
        replica.rest_until = 0.0
        return scores

    async def _exchange(self, url: str, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        async with self._http.stream("POST", url, content=body, headers={"Content-Type": MSGPACK}) as answer:
            content = bytearray()
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _MAX_ANSWER:
                    raise ProtocolError(f"the answer is larger than {_MAX_ANSWER} bytes")
        return answer.status_code, answer.headers, bytes(content)

    async def _health(self, replica: _Replica) -> Health:
        port = replica.url.rpartition(":")[2]
        remedy = f"start it with: xomni serve-reward {self.name} --port {port if port.isdigit() else 8001}"
        try:
            answer = (await self._http.get(replica.url + "/health", timeout=5.0)).raise_for_status()
            health = protocol.decode(answer.content, protocol.JSON, Health)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            raise RewardServiceError(f"no reward service answers at {replica.url} ({type(error).__name__}); {remedy}") from error
        if health.scorer != self.name or health.schema != SCHEMA:
            raise RewardServiceError(f"{replica.url} serves {health.scorer!r}, not {self.name!r} with schema {SCHEMA}; {remedy}")
        return health


def _seconds(header: str | None) -> float:
    """Of a Retry-After header: 1 without a usable one, at most 30."""
    with contextlib.suppress(TypeError, ValueError):
        return min(max(float(header), 0.0), 30.0)
    return 1.0
