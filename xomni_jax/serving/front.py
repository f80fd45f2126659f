"""One address before several running services: it sends each request to the least busy host that has the model.

It holds no model and opens no body further than to see which model is meant; what hosts refuse and answer is passed on as it is.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import msgspec

from xomni_jax.core.http import Refusal
from xomni_jax.core.routing import Replica, Router
from xomni_jax.serving import protocol
from xomni_jax.serving.app import TOKEN, Site, sse, until_gone
from xomni_jax.serving.options import FrontOptions

_WATCH = 2.0  # seconds between two questions to a host how it is
_WAIT = 10.0  # seconds for which a request waits for a host
_PASSED = ("content-type", "content-length", "retry-after")


class _Named(msgspec.Struct):
    """Of a request, what decides where it goes."""

    model: str | None = None


class Hosts(Router):
    """Running services, and which models they have. Those of one name must be alike, so that no image depends on the host."""

    def __init__(self, urls: Sequence[str], options: FrontOptions, token: str):
        super().__init__(urls, options.max_connections, 0.5)
        for replica in self.all:
            if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?", replica.url, re.ASCII):
                raise ValueError(f"--front {replica.url!r} is no address of a service; write http://HOST:PORT")
        if twice := {replica.url for replica in self.all if [r.url for r in self.all].count(replica.url) > 1}:
            raise ValueError(f"--front {min(twice)} is given twice; give each host once")
        secure = any(replica.url.startswith("https") for replica in self.all)
        self.http = httpx.AsyncClient(
            trust_env=False, headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            # A host gives a request up itself after its own deadline, and says so.
            timeout=httpx.Timeout(options.deadline_seconds + 5, connect=5.0), limits=httpx.Limits(max_connections=None),
            verify=ssl.create_default_context() if secure else False,
        )  # fmt: skip

    async def watch(self) -> None:
        """Asks every host now and then how it is: one that answers again gets requests, one that is silent does not."""
        while True:
            await asyncio.gather(*map(self._check, self.all))
            await asyncio.sleep(_WATCH)

    async def _check(self, replica: Replica) -> None:
        if replica.rest_until > time.monotonic():
            return
        try:
            if replica.trusted:
                replica.about = await self.health(replica)
                return
            await self.trust(replica)
        except ValueError as error:
            self.failed(replica, str(error))
        else:
            if replica.failures:
                print(f"xomni serve: {replica.url} takes requests now", file=sys.stderr, flush=True)
            self.answered(replica)

    def failed(self, replica: Replica, reason: str, after: float | None = None) -> None:
        """See `Router`; says when a host gets no more requests."""
        if replica.trusted or not replica.failures:
            print(f"xomni serve: no requests to a host for now: {reason}", file=sys.stderr, flush=True)
        super().failed(replica, reason, after)

    async def health(self, replica: Replica) -> dict[str, dict[str, Any]]:
        """The models of a host as GET /v1/models tells them, by name."""
        try:
            async with asyncio.timeout(5.0):
                ready = await self.http.get(replica.url + "/ready")
                answer = await self.http.get(replica.url + "/v1/models")
        except (httpx.HTTPError, OSError) as error:
            raise ValueError(f"{replica.url} does not answer ({type(error).__name__})") from error
        if ready.status_code == 503:
            raise ValueError(f"{replica.url} is not ready")
        if answer.status_code == 401:
            raise ValueError(f"{replica.url} needs another bearer token; set {TOKEN} to the same there and here")
        try:
            models = {model["id"]: model for model in msgspec.json.decode(answer.content)["data"]}
            alike = {name: model["xomni"] for name, model in models.items()}
        except (LookupError, TypeError, msgspec.DecodeError) as error:
            raise ValueError(f"{replica.url} is no xomni serve, or an older one") from error
        for name, other in ((name, other) for name in alike for other in self.all if other is not replica and other.trusted):
            if name in other.about and other.about[name]["xomni"] != alike[name]:
                raise ValueError(f"{replica.url} serves {name} otherwise than {other.url}; start them alike, or name the models apart")
        return models


class Front(Site):
    """Answers with what hosts answer.

    Args:
      urls: of the hosts. options, local, log: see `Site`.
    """

    prefix = "xomni_front"

    def __init__(self, urls: Sequence[str], options: FrontOptions, local: bool, log: Any = sys.stderr):
        super().__init__(options, local, log)
        self.hosts = Hosts(urls, options, self.token)
        self._watching: asyncio.Task[None] | None = None
        paths = ("/v1/images/generations", "/v1/chat/completions", "/v1/xomni/encode", "/v1/xomni/entropy")
        self.posts |= dict.fromkeys(paths, self.forward) | {"/v1/images/edits": self.forward_form}
        self.gets["/v1/xomni/images/{name}.png"] = self.image

    async def load(self) -> None:
        """Returns when a host answers."""
        self._watching = asyncio.create_task(self.hosts.watch())
        while not self._ready():
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Frees the connections."""
        if self._watching:
            self._watching.cancel()
        await self.hosts.http.aclose()

    def _ready(self) -> list[Replica]:
        return [replica for replica in self.hosts.all if replica.trusted]

    def about_models(self) -> Mapping[str, dict[str, Any]]:
        """The models of all hosts that have ever answered."""
        models: dict[str, dict[str, Any]] = {}
        for replica in self.hosts.all:
            for name, about in (replica.about or {}).items():
                models.setdefault(name, about)
        return models

    def condition(self) -> dict[str, Any]:
        """See `Site`; with the number of hosts, and of those that take requests."""
        told, ready = super().condition(), len(self._ready())
        waiting = {"status": "without a host"} if told["status"] == "ok" and not ready else {}
        return told | waiting | {"hosts": len(self.hosts.all), "ready": ready}

    def numbers(self) -> Iterable[tuple[str, str, float]]:
        """See `Site`."""
        yield "retried_total", "counter", self.counts["retried"]
        for name, kind, value in (
            ("host_ready", "gauge", lambda r: int(r.trusted)), ("host_requests", "gauge", lambda r: r.in_flight),
            ("host_failures", "gauge", lambda r: r.failures),
        ):  # fmt: skip
            yield from ((f'{name}{{host="{replica.url}"}}', kind, value(replica)) for replica in self.hosts.all)

    async def image(self, request: Any, responses: Any) -> Any:
        """GET /v1/xomni/images/{name}.png, from the host that keeps it."""
        name = request.path_params["name"]
        for replica in self._ready() if re.fullmatch(r"[\w-]+", name, re.ASCII) else ():
            try:
                answer = await self.hosts.http.get(f"{replica.url}/v1/xomni/images/{name}.png")
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                return responses.Response(answer.content, media_type="image/png")
        raise Refusal(404, "this image is not kept any more; ask for b64_json to have it at once", 0)

    async def forward(self, request: Any, responses: Any) -> Any:
        """A POST about a model."""
        body = await self.body(request)
        named = protocol.decode(body, _Named).model
        model = self.known(named)
        if named is None:  # the first model of a host may be another one
            body = msgspec.json.encode(msgspec.json.decode(body) | {"model": model})
        return await self._pass_on(request, body, model, responses)

    async def forward_form(self, request: Any, responses: Any) -> Any:
        """A POST about a model, as a multipart form."""
        body = await self.body(request, "multipart/form-data")
        named = protocol.decode_form(await protocol.read_form(body, request.headers), _Named).model
        model = self.known(named)
        if named is None:
            boundary = body[: body.index(b"\r\n")]
            body = boundary + b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model.encode() + b"\r\n" + body
        return await self._pass_on(request, body, model, responses)

    async def _pass_on(self, request: Any, body: bytes, model: str, responses: Any) -> Any:
        known = {"x-forwarded-host": request.url.netloc, "x-forwarded-proto": request.url.scheme}  # what the client calls this address
        headers = {name: request.headers.get(name, own) for name, own in known.items()} | {"content-type": request.headers["content-type"]}
        parts = self._answer(request.url.path, body, headers, model)
        status, passed = await until_gone(request, anext(parts))
        return responses.StreamingResponse(parts, status, passed)

    async def _answer(self, path: str, body: bytes, headers: dict[str, str], model: str) -> AsyncIterator[Any]:
        """(status, headers) of a host's answer, then the parts of its body. Another host is asked when one cannot, or ends before them.

        Only the first one that ends with the request in its hands is replaced: a request may be what ends hosts.
        """
        tried, lost = list[Replica](), 0
        while True:
            replica = await self._host(model, tried)
            begun = stream = False
            try:
                async with self.hosts.http.stream("POST", replica.url + path, content=body, headers=headers) as answer:
                    stream = answer.headers.get("content-type", "").startswith("text/event-stream")
                    async with aclosing(answer.aiter_raw()) as parts:
                        first = await anext(parts, b"")
                        tried.append(replica)
                        if answer.status_code not in (429, 503) or not self._fitting(model, tried):
                            begun = True
                            yield answer.status_code, {k: v for k, v in answer.headers.items() if k in _PASSED}
                            yield first
                            async for part in parts:
                                yield part
                            return
            except httpx.TransportError as error:
                self.hosts.failed(replica, f"{replica.url} ended a request ({type(error).__name__})")
                if begun and stream:
                    yield sse("error", protocol.error_body(502, "the host ended in the midst of its answer; ask again"))
                    return
                if begun:
                    raise
                if isinstance(error, httpx.ReadTimeout):
                    raise Refusal(504, "the request was not done in time; ask for fewer images, or again later", 0) from None
                lost += not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                if lost > 1:
                    raise Refusal(502, "two hosts ended before they answered; this request may be why, or ask again later", 0) from None
            finally:
                self.hosts.release(replica)
            self.counts["retried"] += 1

    def _fitting(self, model: str, tried: Sequence[Replica]) -> list[Replica]:
        """Hosts that take requests for a model, but for some."""
        return [replica for replica in self._ready() if model in replica.about and replica not in tried]

    async def _host(self, model: str, tried: Sequence[Replica]) -> Replica:
        """The host that is asked next. Refusal (503) when there is none in time."""
        until = time.monotonic() + _WAIT
        try:
            return await self.hosts.acquire(lambda: until, lambda r: r not in tried and model in (r.about or {}))
        except TimeoutError:
            raise Refusal(503, f"no host that has {model} answers; try again", 5) from None
