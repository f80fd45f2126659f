"""The HTTP server around one scorer. Worker processes score, so the event loop always answers.

POST /score scores images. GET /health tells the state, /ready whether the scorer is loaded (for load balancers), /info what the values
mean, /metrics the counts for Prometheus, /openapi.json the protocol.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from xomni_jax.core.http import BodyReader, HTTPOptions, Refusal, check_token, prometheus
from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import JSON, MSGPACK, SCHEMA, Health, Limits, ProtocolError, Request, Response, Score
from xomni_jax.rewards.scorer import ServiceError, Unavailable, need, scorer_class
from xomni_jax.rewards.wires import WIRES
from xomni_jax.rewards.workers import Workers

TOKEN = "XOMNI_REWARD_TOKEN"  # environment variable with the bearer token of services and clients
_MAX_SET = 4096  # images of a set
_KEPT = 512  # answers that are kept for clients that repeat a request
_AWAY = 2  # seconds after which to ask a scorer again whose model is away
_INFO = ("schema", "accepts", "scorer", "version", "model_hash", "scale", "range", "scope", "token", "limits")
_COUNTS = ("requests", "repeated", "abandoned", "rejected", "scored", "not_applicable", "failed")


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(HTTPOptions):
    """Flags of every service.

    Attributes:
      workers: processes that score, one thread each; about one per core; one alone for a scorer that judges whole sets
      protocol: of the clients: xomni, or another project's, flow_grpo or unirl
      slice_seconds: most that a worker may take for the few images it is given at a time; then it is replaced
      max_queue: images accepted and not yet scored; a request beyond it is answered 429
    """

    workers: int = 2
    protocol: Literal["xomni", "flow_grpo", "unirl"] = "xomni"
    slice_seconds: float = 120.0
    max_queue: int = 1024


@dataclass(frozen=True)
class ServiceConfig(ServiceOptions):
    """One service.

    Attributes:
      scorer: a name of `scorer.SCORERS`, or path/to/file.py:Class.
      options: fields of the scorer's `Options`.
      max_buffered: bytes of requests that are being received.
      abandoned_seconds: a request whose client has gone is given up if it is not repeated within this time.
      limits: what one request may hold.
    """

    scorer: str
    options: dict[str, Any] = field(default_factory=dict)
    max_buffered: int = 256 << 20
    abandoned_seconds: float = 2.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("workers", "slice_seconds", "max_queue")


@dataclass
class _Job:
    """A request that is being scored, or was: repeated requests share it."""

    scoring: asyncio.Task[tuple[list[Score], bytes]]
    waiting: int = 0  # clients


class RewardService:
    """State and routes of one service."""

    def __init__(self, config: ServiceConfig):
        scorer = scorer_class(config.scorer)
        if scorer.scope == "set":  # which a request must hold as a whole
            config = dataclasses.replace(config, limits=dataclasses.replace(config.limits, max_images=_MAX_SET))
        self.config, self.started = config, time.monotonic()
        self.wire = WIRES[config.protocol]()
        self.token = os.environ.get(TOKEN, "")
        self.workers = Workers(config.scorer, config.options, config.workers, config.limits, config.slice_seconds)
        self.state = Health(
            status="loading", schema=SCHEMA, accepts=(MSGPACK, JSON), scorer=scorer.name, scale=scorer.scale, range=scorer.range,
            scope=scorer.scope, token=bool(self.token), workers=config.workers, limits=config.limits,
        )  # fmt: skip
        self.jobs: OrderedDict[tuple[str, bytes], _Job] = OrderedDict()
        self.bodies = BodyReader(config.limits.max_body_bytes, config.body_seconds, config.max_buffered, "send fewer images at once")

    # ---- what it is and how it is ----
    def health(self) -> Health:
        """The current state."""
        state = self.state
        state.version, state.model_hash = self.workers.version, self.workers.model_hash
        state.slowest_seconds, state.uptime_seconds = round(self.workers.slowest(), 3), round(time.monotonic() - self.started, 3)
        if state.status != "loading":
            state.status = "stuck" if state.slowest_seconds > 1.1 * self.config.slice_seconds + 1 else "ok"
        return state

    def info(self) -> dict[str, Any]:
        """What a client needs to know of the scorer."""
        told = msgspec.to_builtins(self.health())
        return {name: told[name] for name in _INFO}

    def metrics(self) -> str:
        """The counts in Prometheus' text format."""
        state = self.health()
        numbers = [(f"{name}_total", "counter", getattr(state, name)) for name in _COUNTS]
        numbers.append(("busy_seconds_total", "counter", state.busy_seconds))
        numbers += [(name, "gauge", getattr(state, name)) for name in ("queue", "slowest_seconds", "uptime_seconds")]
        return prometheus("xomni_reward", f'scorer="{state.scorer}"', [*numbers, ("ready", "gauge", int(state.status == "ok"))])

    def retry_after(self) -> int:
        """Seconds until the queue is probably empty, 1 to 60."""
        workers = self.workers
        each = workers.seconds_busy / workers.images if workers.images else 0.02
        return int(min(max(math.ceil(self.state.queue * each / self.config.workers), 1), 60))

    # ---- scoring ----
    async def score(self, request: Any) -> tuple[bytes, str]:
        """The answer to a POST, and its content type. Refusal or ProtocolError when it is not accepted."""
        check_token(request.headers, self.token, TOKEN)
        if self.state.status == "loading":
            raise Refusal(503, "the scorer is still loading", 5)
        content_type = protocol.media_type(request.headers)
        body = await self.bodies.read(request)
        message = self.wire.read_request(body, content_type, self.config.limits)
        if self.state.scope == "group" and not all(item.get("group") for item in message.items):
            raise ProtocolError(f"{self.state.scorer} compares the images of a group; give every item a group")
        scores, remembered = await self.result(request, message, hashlib.blake2b(body, digest_size=16).digest())
        about = {"version": self.workers.version, "model_hash": self.workers.model_hash} | ({"state": remembered} if remembered else {})
        return self.wire.write_response(message, self.state.scorer, scores, content_type, **about)

    async def result(self, request: Any, message: Request, digest: bytes) -> tuple[list[Score], bytes]:
        """Scores of a request, and what the scorer remembers after it; of one that is repeated, those of the first time."""
        key = (message.id, digest)
        job = self.jobs.get(key)
        if job is None or job.scoring.done() and (job.scoring.cancelled() or job.scoring.exception()):
            if self.state.queue and self.state.queue + len(message.images) > self.config.max_queue:
                raise Refusal(429, f"{self.state.queue} images wait already; try again", self.retry_after())
            job = self.jobs[key] = _Job(asyncio.create_task(self.run(message)))
            for old in [k for k, j in self.jobs.items() if j.scoring.done()][:-_KEPT]:
                del self.jobs[old]
        else:
            self.state.repeated += 1
        job.waiting += 1
        gone = asyncio.create_task(request.receive())  # the next event after the body: the client has closed its connection
        try:
            await asyncio.wait((job.scoring, gone), return_when=asyncio.FIRST_COMPLETED)
            if not job.scoring.done():
                asyncio.create_task(self.abandon(job))
                raise Refusal(499, "the client has gone", 0)
        finally:
            gone.cancel()
            job.waiting -= 1
        return job.scoring.result()

    async def abandon(self, job: _Job) -> None:
        """Gives a request up whose client has gone, unless it is repeated soon."""
        await asyncio.sleep(self.config.abandoned_seconds)
        if not job.waiting and not job.scoring.done():
            self.state.abandoned += 1
            job.scoring.cancel()

    async def run(self, message: Request) -> tuple[list[Score], bytes]:
        """Scores a request's images and counts them. See `Workers.score`."""
        state, n, began = self.state, len(message.images), time.monotonic()
        state.queue += n
        state.requests += 1
        try:
            scores, remembered = await self.workers.score(message.images, message.items, message.progress, message.state)
        finally:
            state.queue -= n
            state.busy_seconds += time.monotonic() - began
        state.failed += sum(s.failed for s in scores)
        state.not_applicable += sum(not s.applies for s in scores)
        state.scored += sum(s.value is not None for s in scores)
        return scores, remembered


def create_app(config: ServiceConfig, ready: Callable[[], None] = lambda: None, failed: Callable[[], None] = lambda: None) -> Any:
    """The FastAPI application of one scorer; its workers start and end with it.

    `ready` is called when they have started, `failed` when they cannot; then `app.state.failure` is the ServiceError.
    """
    fastapi = need("fastapi", config.scorer)
    service = RewardService(config)

    async def load(app: Any) -> None:
        try:
            await service.workers.start()
            service.state.status = "ok"
            ready()
        except ServiceError as error:
            app.state.failure = error
            failed()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        loading = asyncio.create_task(load(app))
        try:
            yield
        finally:
            loading.cancel()
            service.workers.close()

    def refuse(status: int, sentence: str, retry: int = 0) -> Any:
        service.state.rejected += 1
        return fastapi.responses.JSONResponse({"error": sentence}, status, {"Retry-After": str(retry)} if retry else None)

    async def score(request: Any) -> Any:
        try:
            body, content_type = await service.score(request)
        except ProtocolError as error:
            return refuse(error.status, str(error))
        except Refusal as refusal:
            return refuse(*refusal.args)
        except Unavailable as error:
            return refuse(503, str(error), _AWAY)
        return fastapi.Response(body, media_type=content_type)

    async def health(request: Any) -> Any:
        state = service.health()
        return fastapi.Response(protocol.encode(state, JSON), 503 if state.status == "stuck" else 200, media_type=JSON)

    async def is_ready(request: Any) -> Any:
        status = service.health().status
        return fastapi.responses.JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def info(request: Any) -> Any:
        return fastapi.responses.JSONResponse(service.info())

    async def metrics(request: Any) -> Any:
        return fastapi.responses.PlainTextResponse(service.metrics())

    app = fastapi.FastAPI(title=f"xomni reward: {service.state.scorer}", version=str(SCHEMA), lifespan=lifespan)
    app.state.failure, app.state.service = None, service
    app.openapi = functools.partial(openapi, service.state.scorer)
    for path, route in {"/health": health, "/ready": is_ready, "/info": info, "/metrics": metrics}.items():
        app.add_route(path, route)
    app.add_route(service.wire.path, score, methods=["POST"])
    return app


def openapi(scorer: str = "") -> dict[str, Any]:
    """The protocol as an OpenAPI description."""
    (request, response, health), schemas = msgspec.json.schema_components(
        (Request, Response, Health), ref_template="#/components/schemas/{name}"
    )
    content = lambda schema, *types: {"content": {t: {"schema": schema} for t in types}}
    error = content({"type": "object", "properties": {"error": {"type": "string"}}}, JSON)
    refusals = {"400": "malformed", "401": "no token", "408": "too slow", "413": "over a limit", "429": "busy", "503": "not ready"}
    score = {
        "summary": "Scores of images",
        "requestBody": {"required": True} | content(request, JSON, MSGPACK),
        "responses": {"200": {"description": "a score, an error or neither for each image"} | content(response, JSON, MSGPACK)}
        | {code: {"description": why} | error for code, why in refusals.items()},
    }
    get = lambda summary, body: {"get": {"summary": summary, "responses": {"200": {"description": summary} | body}}}
    any_object = content({"type": "object"}, JSON)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"xomni reward {scorer}".strip(), "version": str(SCHEMA), "description": protocol.__doc__},
        "paths": {
            "/score": {"post": score},
            "/health": get("State of the service", content(health, JSON)),
            "/ready": get("Whether the scorer is loaded", any_object),
            "/info": get("What the values mean", any_object),
            "/metrics": get("Counts for Prometheus", content({"type": "string"}, "text/plain")),
        },
        "components": {"schemas": schemas},
    }
