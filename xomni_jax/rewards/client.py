"""The trainer's side of a reward: requests in chunks over several replicas, which waits an outage out and never guesses a score."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from xomni_jax.core.routing import Replica
from xomni_jax.rewards import protocol
from xomni_jax.rewards.answers import Answers, answer_key
from xomni_jax.rewards.protocol import Health, Item, ProtocolError, Request, Response, Score
from xomni_jax.rewards.replicas import ClientConfig, NoAnswer, NotNow, Refused, Replicas, RewardServiceError

_CLOSED = Score(None, "the client was closed before this image was scored")
T = TypeVar("T")


class RewardClient:
    """One scorer behind one or several URLs. All requests run on an event loop in a thread of the client's own.

    Args:
      name: of the scorer that must answer.
      urls: its replicas.
      poll: called about every `poll_every` seconds while `score` waits; may raise (preemption) to abandon the wait.
      say: told when a replica stops to answer and when it answers again.
      answers: file in which answers are kept for the same run after a restart.
      options: fields of ClientConfig.

    Attributes:
      state: what a scorer of whole sets is to remember of earlier requests; whoever asks sets it to `state_after` when a step is done.
      state_after: what it remembers after its newest answer.
    """

    def __init__(
        self,
        name: str,
        urls: str | Sequence[str],
        *,
        poll: Callable[[], None] | None = None,
        poll_every: float = 0.5,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        answers: Path | None = None,
        **options: Any,
    ):
        self.name, self._poll, self._poll_every, self._say = name, poll, poll_every, say
        self.config = ClientConfig(urls=(urls,) if isinstance(urls, str) else tuple(urls), **options)
        self.replicas = Replicas(name, self.config, say)
        self.state = self.state_after = b""
        self._answers = Answers(answers, self.config.cache) if answers and self.config.cache else None
        self._encoding = asyncio.Semaphore(1 + self.config.concurrency * len(self.urls))  # bounds the encoded images in memory
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
        return tuple(replica.url for replica in self.replicas.all)

    def health(self) -> list[Health]:
        """State of every replica. RewardServiceError naming the URL when one does not answer or serves something else."""
        answers = self._start(self.replicas.all_health()).result()
        for answer in answers:
            if isinstance(answer, RewardServiceError):
                raise answer
        return answers

    def connect(self, wait: float = 0.0) -> Health:
        """The state of a replica, once one answers, for `wait` seconds at most; says which do not.

        Raises:
          NoAnswer: none does.
          RewardServiceError: one serves another scorer, or they differ in version or model.
        """
        deadline, told = time.monotonic() + wait, False
        while True:
            answers = self._start(self.replicas.all_health()).result()
            for answer in answers:
                if isinstance(answer, RewardServiceError) and not isinstance(answer, NoAnswer):
                    raise answer
            good = [answer for answer in answers if isinstance(answer, Health)]
            silent = [answer for answer in answers if isinstance(answer, NoAnswer)]
            if good:
                for error in silent:
                    self._say(f"reward {self.name}: {error}; going on without it")
                return good[0]
            if time.monotonic() >= deadline:
                raise silent[0]
            if not told:
                self._say(f"reward {self.name}: {silent[0]}; waiting for it, up to {wait:g} s")
                told = True
            if self._poll:
                self._poll()
            time.sleep(min(self._poll_every, 1.0))

    def versions(self) -> str:
        """The different versions of the scorer that the replicas report, joined by ", "."""
        return ", ".join(sorted({health.version for health in self.health()}))

    def score(self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[Item]) -> list[Score]:
        """One Score per image (uint8 [Y, X, 3], a PIL image, or encoded bytes). Never raises for a failing service."""
        return self.wait(self.score_async(images, items))

    def score_async(
        self, images: Sequence[np.ndarray | Image.Image | bytes], items: Sequence[Item], progress: float | None = None
    ) -> Future[list[Score]]:
        """`score` in the background, to overlap with other work; `wait` collects the result. `progress`: share of the training done."""
        return self._start(self._score(list(images), list(items), progress))

    def wait(self, future: Future[list[Score]], poll: Callable[[], None] | None = None) -> list[Score]:
        """The result of score_async, calling `poll` (or the client's) while waiting."""
        poll = poll or self._poll
        while True:
            try:
                return future.result(self._poll_every if poll else None)
            except TimeoutError:
                poll()

    # ---- the client's thread ----
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
        await self.replicas.close()
        if self._answers:
            self._answers.close()
        await self._loop.shutdown_default_executor()

    async def _score(self, images: list[Any], items: list[Item], progress: float | None) -> list[Score]:
        if not images:
            return []
        try:
            first = await self.replicas.acquire(time.monotonic())
            self.replicas.release(first)
            size, scope = min(self.config.chunk, first.about.limits.max_images), first.about.scope
            scored = await asyncio.gather(
                *(self._score_chunk(images[p], items[p], progress, scope) for p in protocol.slices(items, size, scope))
            )
        except TimeoutError:
            return [self._unanswered()] * len(images)
        except RewardServiceError as error:
            return [Score(None, str(error))] * len(images)
        except asyncio.CancelledError:  # by `close`: whoever waits gets an answer all the same
            return [_CLOSED] * len(images)
        return [score for part in scored for score in part]

    async def _score_chunk(self, images: list[Any], items: list[Item], progress: float | None, scope: str) -> list[Score]:
        try:
            async with self._encoding:
                files = await asyncio.gather(*(asyncio.to_thread(self._encode, image) for image in images))
                encoded = {n: file for n, file in enumerate(files) if isinstance(file, bytes)}
                scores = {n: failure for n, failure in enumerate(files) if isinstance(failure, Score)}
                sent = [items[n] for n in encoded]
                answers = await self._ask(list(encoded.values()), sent, progress, scope) if encoded else []
                scores |= zip(encoded, answers)
        except Exception as error:  # noqa: BLE001 - whatever happens concerns these images alone
            scores = dict.fromkeys(range(len(images)), Score(None, f"{self.name}: {type(error).__name__}: {error}"))
        return [scores[n] for n in range(len(images))]

    def _encode(self, image: Any) -> bytes | Score:
        """The image's file, or the failure of one that has none."""
        try:
            return image if isinstance(image, bytes) else protocol.encode_image(image)
        except ValueError as error:
            return Score(None, f"{self.name}: {error}")

    async def _ask(self, images: list[bytes], items: list[Item], progress: float | None, scope: str) -> list[Score]:
        """`_request` about those of the images that no earlier answer is kept of."""
        if self._answers is None or scope == "set":
            return await self._request(images, items, progress, scope)
        identity = self.replicas.identity
        about, parts = (self.name, identity, self.config.range, progress), protocol.slices(items, 1, scope)
        keys = await asyncio.to_thread(lambda: [answer_key(about, images[p], items[p]) for p in parts])
        known = {key: scores for key in keys if (scores := self._answers.find(key))}
        asked = [p for p, key in zip(parts, keys) if key not in known]
        if asked:
            some = lambda rows: [row for p in asked for row in rows[p]]
            scores = iter(await self._request(some(images), some(items), progress, scope))
            new = {key: [next(scores) for _ in items[p]] for p, key in zip(parts, keys) if key not in known}
            if self.replicas.identity == identity:
                self._answers.keep({key: own for key, own in new.items() if not any(score.failed for score in own)})
            known |= new
        return [score for key in keys for score in known[key]]

    async def _request(self, images: list[bytes], items: list[Item], progress: float | None, scope: str) -> list[Score]:
        """One request with retries, under one id, so that a service scores it once.

        A chunk that is refused, takes too long or is answered with errors only is halved: one bad image must not fail its neighbours.
        """
        id, began, tries, failure = uuid.uuid4().hex, time.monotonic(), 0, Score(None, "")
        keys, parts = [f"{id[:8]}-{n}" for n in range(len(images))], protocol.slices(items, math.ceil(len(items) / 2), scope)
        request = Request(schema=protocol.SCHEMA, id=id, images=images, items=items, keys=keys, scorer=self.name, progress=progress)
        request.state = self.state if scope == "set" else b""
        while tries < self.config.attempts:
            try:
                replica = await self.replicas.acquire(began)
            except TimeoutError:
                return [self._unanswered()] * len(images)
            try:
                async with asyncio.timeout(min(self.config.timeout, self.config.max_wait)):
                    scores, response = await self._post(replica, request)
                    self.state_after = response.state or b""
                    return scores
            except NotNow as error:
                self.replicas.failed(replica, str(error), error.args[1])
            except Refused as refusal:
                failure = Score(None, str(refusal), kind="refused")
                break
            except (httpx.HTTPError, httpx.InvalidURL, ProtocolError, OSError) as error:
                tries += 1
                slow = isinstance(error, TimeoutError) and not str(error)
                why = f"no answer within {self.config.timeout:g} s" if slow else str(error) or type(error).__name__
                self.replicas.failed(replica, why)
                failure = Score(None, f"{self.name} could not be scored after {tries} failed tries: {replica.url}: {why}", kind="invalid")
                if slow and len(parts) > 1:
                    break
            finally:
                self.replicas.release(replica)
        if len(parts) == 1 or self.replicas.fault or " (401)" in failure.error or " (403)" in failure.error:
            return [failure] * len(images)
        halves = await asyncio.gather(*(self._request(images[p], items[p], progress, scope) for p in parts))
        return [score for half in halves for score in half]

    async def _post(self, replica: Replica, request: Request) -> tuple[list[Score], Response]:
        """The answer of a replica, or that of another one which is asked too when it takes longer than `hedge` seconds."""

        async def ask(replica: Replica) -> tuple[list[Score], Response]:
            await self.replicas.trust(replica)
            return await self.replicas.post(replica, request)

        first = asyncio.create_task(ask(replica))
        asked = {first: replica}
        try:
            await asyncio.wait(asked, timeout=self.config.hedge or None)
            if not first.done() and (other := self.replicas.spare(replica)):
                asked[asyncio.create_task(ask(other))] = other
            pending = set(asked)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.exception():
                        replica.trusted &= task is first  # one that may hang must say that it lives, before it gets more
                        return task.result()
            return first.result()
        finally:
            for task in asked:
                task.cancel()
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            for other, outcome in list(zip(asked.values(), outcomes))[1:]:
                if isinstance(outcome, Exception):
                    self.replicas.failed(other, str(outcome) or type(outcome).__name__)
                self.replicas.release(other)

    def _unanswered(self) -> Score:
        return Score(None, f"{self.name}: nothing answered for {self.config.max_wait:g} s ({self.replicas.reason})", kind="unanswered")
