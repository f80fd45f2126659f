"""Which of a service's replicas gets a request, and when one that failed gets requests again."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_MAX_REST = 15.0  # seconds for which a replica that fails gets no requests


@dataclass
class Replica:
    """Not trusted at first and after a failure: then it is asked what it is, before it gets work.

    Attributes:
      in_flight: its requests. failures: in a row. failing_since: monotonic time of the first of them; 0: none.
      rest_until: monotonic time before which it gets no request.
      about: what it has said of itself.
      reason: its newest failure.
    """

    url: str
    in_flight: int = 0
    failures: int = 0
    failing_since: float = 0.0
    rest_until: float = 0.0
    trusted: bool = False
    about: Any = None
    reason: str = ""


class Router:
    """The replicas of one service; everything but the constructor runs on one event loop. A subclass says how one is asked what it is.

    Args:
      concurrency: requests under way at a replica at most. backoff: seconds of the first rest, doubled from failure to failure.

    Attributes:
      reason: the newest failure of any.
    """

    def __init__(self, urls: Iterable[str], concurrency: int, backoff: float):
        self.all = [Replica(url.rstrip("/")) for url in urls]
        self.reason = "no replica was free"
        self._concurrency, self._backoff, self._changed = concurrency, backoff, asyncio.Event()

    async def health(self, replica: Replica) -> Any:
        """What a replica says of itself. ValueError, with a sentence, when it cannot be used."""
        raise NotImplementedError

    async def acquire(self, until: Callable[[], float], fits: Callable[[Replica], bool] = lambda replica: True) -> Replica:
        """The replica with the fewest requests under way, once there is one that answers; `release` gives it back.

        Args:
          until: the monotonic time at which to give up, asked whenever something has changed; what it raises ends the wait.
          fits: whether a replica may take the request.

        Raises:
          TimeoutError: there was none until then.
        """
        while True:
            deadline, now = until(), time.monotonic()
            if now > deadline:
                raise TimeoutError
            if not (free := [r for r in self._free() if fits(r)]):
                resting = [r.rest_until for r in self.all if r.rest_until > now]
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min([deadline, *resting]) - now + 0.001):
                        await self._changed.wait()
                continue
            replica = min(free, key=_preference)
            replica.in_flight += 1
            try:
                await self.trust(replica)
                return replica
            except ValueError as error:
                self.failed(replica, str(error))
                self.release(replica)
            except BaseException:
                self.release(replica)
                raise

    async def trust(self, replica: Replica) -> None:
        """Asks a replica what it is, unless it is trusted. ValueError."""
        if replica.trusted:
            return
        replica.rest_until = math.inf  # others wait for what it says
        try:
            replica.about = await self.health(replica)
            replica.trusted = True
        finally:
            replica.rest_until = 0.0
        self._changed.set()

    def spare(self, other: Replica) -> Replica | None:
        """A replica that is free now but for one, if there is any, to be trusted first; `release` gives it back."""
        replica = min((r for r in self._free() if r is not other), key=_preference, default=None)
        if replica:
            replica.in_flight += 1
        return replica

    def _free(self) -> list[Replica]:
        now = time.monotonic()
        return [r for r in self.all if r.rest_until <= now and r.in_flight < self._concurrency]

    def release(self, replica: Replica) -> None:
        """The end of a request."""
        replica.in_flight -= 1
        self._changed.set()

    def failed(self, replica: Replica, reason: str, after: float | None = None) -> None:
        """Lets a replica rest, longer after each failure and never as long as its neighbours; then it is asked how it is."""
        now = time.monotonic()
        replica.failures += 1
        replica.failing_since = replica.failing_since or now
        rest = min(self._backoff * 2 ** (replica.failures - 1), _MAX_REST) if after is None else after
        replica.rest_until, replica.trusted = now + rest * random.uniform(0.75, 1.25), False
        self.reason = replica.reason = reason if replica.url in reason else f"{replica.url}: {reason}"

    def answered(self, replica: Replica) -> None:
        """A request that was answered ends a replica's failures."""
        replica.failures, replica.failing_since = 0, 0.0


def _preference(replica: Replica) -> tuple[bool, int]:
    return not replica.trusted, replica.in_flight


def retry_after(header: str | None) -> float | None:
    """Of a Retry-After header, in seconds or as a date; at most 60. None without a usable one."""
    with contextlib.suppress(TypeError, ValueError):
        return min(max(float(header), 0.0), 60.0)
    with contextlib.suppress(TypeError, ValueError):
        return min(max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0), 60.0)
    return None
