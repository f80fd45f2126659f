"""The replicas of a scoring service: which one gets a request, whether it may be trusted again, and what its answer is worth."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from xomni_jax.core.config import Count, Finite, Natural, NonNegative, Positive, check_known
from xomni_jax.core.routing import Replica, Router, retry_after
from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import Health, ProtocolError, Request, Response, Score
from xomni_jax.rewards.wires import WIRES

_MAX_ANSWER = 64 << 20
_NOT_NOW = (404, 408, 425, 429, 499, 502, 503, 504)  # of a service that is busy, or of what stands before one that restarts


class RewardServiceError(ValueError):
    """A service cannot be used: another scorer answers, or an option does not fit. One sentence with the remedy."""


class NoAnswer(RewardServiceError):
    """No service answers at an address. One sentence with the command that starts it."""


@dataclass(frozen=True)
class ClientConfig:
    """How a scoring service is reached.

    Attributes:
      urls: addresses of its service; several are replicas of one scorer
      protocol: of the service: xomni, or that of another project, flow_grpo or unirl
      chunk: images per request; groups that are judged together stay together
      concurrency: requests under way per address; raise it where one address stands for several machines
      timeout: seconds for one request; a chunk that takes longer is halved
      max_wait: seconds without any answer from the service after which the images that wait for it have failed
      attempts: tries of a chunk to which a service that is up answers with errors; then it is halved, and an image alone has failed
      backoff: seconds before the first retry; doubled from failure to failure of a replica
      hedge: seconds after which another replica is asked about the same chunk too, and the first answer counts; 0: never
      cache: answers that a run keeps in its directory, so that steps repeated after a restart do not ask again; 0: none. Not of scorers
        that compare whole sets
      range: smallest and largest value; None: as the service says. What is outside is a failure
      any_version: accept that the scorer's version or model changes in the middle of a run
      token: environment variable with the service's bearer token; not sent where it is not set
      headers: more headers of each request as 'Name: value', in which $NAME is an environment variable
      ca: file of the certificates that https services are trusted by; empty: those of the system
    """

    urls: tuple[str, ...] = ()
    protocol: str = "xomni"
    chunk: Count = 32
    concurrency: Count = 2
    timeout: Positive = 120.0
    max_wait: Positive = 600.0
    attempts: Count = 4
    backoff: Positive = 0.25
    hedge: NonNegative = 0.0
    cache: Natural = 16384
    range: tuple[Finite, Finite] | None = None
    any_version: bool = False
    token: str = "XOMNI_REWARD_TOKEN"
    headers: tuple[str, ...] = ()
    ca: str = ""

    def __post_init__(self) -> None:
        check_known(self, protocol=tuple(WIRES))
        if self.ca and not os.path.isfile(self.ca):
            raise ValueError(f"ca={self.ca!r}: there is no such file")

    def all_headers(self) -> dict[str, str]:
        """Headers of each request. ValueError for one that is malformed or names a variable that is not set."""
        out = {"Authorization": f"Bearer {token}"} if (token := os.environ.get(self.token)) else {}
        for header in self.headers:
            name, colon, value = header.partition(":")
            value = os.path.expandvars(value).strip()
            if not colon or "$" in value:
                raise ValueError(f"headers: {header!r} is not 'Name: value', or its variable is not set")
            out[name.strip()] = value
        return out


class NotNow(Exception):
    """A status of _NOT_NOW; the argument is the number of seconds after which to ask again, if the service tells."""


class Refused(Exception):
    """The service will not score this chunk however often it is asked (400, 401, 413, other 4xx)."""


class Replicas(Router):
    """The replicas of one scorer.

    Attributes:
      identity: version and model hash of the scorer, once it has answered.
      fault: why its scores cannot be used any more: another version or model answers than before.
    """

    def __init__(self, name: str, config: ClientConfig, say: Callable[[str], None]):
        super().__init__(config.urls, config.concurrency, config.backoff)
        self.name, self.config, self._say = name, config, say
        self.identity, self.fault = ("", ""), ""
        for replica in self.all:
            if not replica.url.startswith(("http://", "https://")):
                raise RewardServiceError(f"reward {name!r} has the URL {replica.url!r}; it must begin with http:// or https://")
        self._wire, secure = WIRES[config.protocol](), any(replica.url.startswith("https") for replica in self.all)
        try:
            # trust_env off: a proxy meant for the outside world must not receive requests to a neighbour.
            self._http = httpx.AsyncClient(
                trust_env=False, headers=config.all_headers(), timeout=httpx.Timeout(config.timeout, connect=min(5.0, config.timeout)),
                limits=httpx.Limits(max_connections=None), verify=ssl.create_default_context(cafile=config.ca or None) if secure else False,
            )  # fmt: skip
        except ValueError as error:
            raise RewardServiceError(f"reward {name!r}: {error}") from None
        self._heard = 0.0  # when the service has last scored something

    async def acquire(self, began: float) -> Replica:  # type: ignore[override]
        """See `Router`. TimeoutError when nothing has been scored for as long as the client may wait, or since `began`."""

        def until() -> float:
            if self.fault:
                raise RewardServiceError(self.fault)
            return max(began, self._heard) + self.config.max_wait

        return await super().acquire(until)

    def failed(self, replica: Replica, reason: str, after: float | None = None) -> None:
        """See `Router`; says once that a replica does not answer."""
        super().failed(replica, reason, after)
        now = time.monotonic()
        if now - replica.failing_since < 5 <= replica.rest_until - replica.failing_since:
            self._say(f"reward {self.name}: {self.reason}; asking again for up to {self.config.max_wait:g} s")

    async def post(self, replica: Replica, request: Request) -> tuple[list[Score], Response]:
        """The scores of a request, and the answer they came in. NotNow, Refused, or whatever else goes wrong with an answer."""
        body, content_type = await asyncio.to_thread(self._wire.write_request, request, replica.about)
        status, headers, content = await self._exchange(replica.url + self._wire.path, body, content_type)
        if status in _NOT_NOW:
            raise NotNow("it is busy" if status == 429 else f"HTTP {status}", retry_after(headers.get("retry-after")))
        if 400 <= status < 500:
            raise Refused(f"{replica.url} refused ({status}): {content[:300].decode('utf-8', 'replace')}")
        if status != 200:
            raise ProtocolError(f"HTTP {status}: {content[:200].decode('utf-8', 'replace')}")
        scores, response = self._wire.read_response(content, protocol.media_type(headers), request, self.name)
        self._identify(replica.url, response.version, response.model_hash)
        now = time.monotonic()
        if replica.failing_since and now - replica.failing_since > 5:
            self._say(f"reward {self.name}: {replica.url} answers again after {now - replica.failing_since:.0f} s")
        self._heard = now
        self.answered(replica)
        low, high = self.config.range or replica.about.range
        checked = [
            score if score.value is None or low <= score.value <= high
            else Score(None, f"{self.name} at {replica.url} gave {score.value:g}, which is outside {low:g} to {high:g}", kind="invalid")
            for score in scores
        ]  # fmt: skip
        return checked, response

    async def _exchange(self, url: str, body: bytes, content_type: str) -> tuple[int, httpx.Headers, bytes]:
        async with self._http.stream("POST", url, content=body, headers={"Content-Type": content_type}) as answer:
            content = bytearray()
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _MAX_ANSWER:
                    raise ProtocolError(f"the answer is larger than {_MAX_ANSWER} bytes")
        return answer.status_code, answer.headers, bytes(content)

    async def all_health(self) -> list[Health | RewardServiceError]:
        """What every replica says of itself, or why it cannot be used."""

        async def one(replica: Replica) -> Health | RewardServiceError:
            try:
                return await self.health(replica)
            except RewardServiceError as error:
                return error

        return await asyncio.gather(*map(one, self.all))

    async def health(self, replica: Replica) -> Health:
        """What a replica says of itself. RewardServiceError."""
        port = replica.url.rpartition(":")[2]
        remedy = f"start it with: xomni serve-reward {self.name} --port {port if port.isdigit() else 8001}"
        try:
            async with asyncio.timeout(5.0):
                answer = await self._http.get(replica.url + self._wire.probe)
            health = self._wire.read_health(answer.status_code, answer.content, self.name)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            why = str(error) if isinstance(error, ProtocolError) else type(error).__name__
            raise NoAnswer(f"no reward service answers at {replica.url} ({why}); {remedy}") from error
        if health.scorer != self.name:
            raise RewardServiceError(f"{replica.url} serves {health.scorer!r}, not {self.name!r}; {remedy}")
        if health.schema < protocol.SCHEMA:
            raise RewardServiceError(f"{replica.url} speaks schema {health.schema}, which has no keys; update it to {protocol.SCHEMA}")
        if health.token and "authorization" not in self._http.headers:
            raise RewardServiceError(f"{replica.url} needs a bearer token; set the environment variable {self.config.token} to it")
        self._identify(replica.url, health.version, health.model_hash)
        return health

    def _identify(self, url: str, version: str, model_hash: str) -> None:
        """Notes which version of the scorer answers; RewardServiceError when it is another one than before."""
        now, before = (version, model_hash), self.identity
        if not any(now) or now == before:
            return
        told = lambda who: f"version {who[0] or '?'}" + f" of model {who[1][:12]}" * bool(who[1])
        if any(before):
            what = f"{self.name} at {url} is {told(now)}, others were {told(before)}: their values cannot be compared"
            if not self.config.any_version:
                self.fault = f"{what}; start the same one everywhere, or allow it with any_version=True"
                raise RewardServiceError(self.fault)
            self._say(f"reward {what}, which any_version allows")
        self.identity = now

    async def close(self) -> None:
        """Frees the connections."""
        await self._http.aclose()
