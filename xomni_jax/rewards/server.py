"""The HTTP server around one scorer: POST /score, GET /health. Worker processes score, so the event loop always answers."""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import JSON, SCHEMA, Health, Limits, ProtocolError
from xomni_jax.rewards.scorer import ServiceError, need, scorer_class
from xomni_jax.rewards.workers import ONE_THREAD, Workers


@dataclass(frozen=True)
class ServiceConfig:
    """One service.

    Attributes:
      scorer: a name of `scorer.SCORERS`, or path/to/file.py:Class.
      options: fields of the scorer's `Options`.
      workers: processes that score.
      max_queue: images accepted and not yet scored, at least those of one request; a request beyond it is answered 429.
      limits: what one request may hold.
    """

    scorer: str
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    max_queue: int = 1024
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ServiceError(f"--workers {self.workers} must be at least 1")


def create_app(config: ServiceConfig, ready: Callable[[], None] = lambda: None) -> Any:
    """The FastAPI application of one scorer; its workers start and end with it.

    `ready` is called when they have started. When they cannot, `app.state.failure` is the ServiceError.
    """
    fastapi = need("fastapi", config.scorer)
    workers = Workers(config.scorer, config.options, config.workers, config.limits)
    state = Health(schema=SCHEMA, scorer=scorer_class(config.scorer).name, workers=config.workers, limits=config.limits)
    started = time.monotonic()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        try:
            await workers.start()
            ready()
            yield
        except ServiceError as error:
            app.state.failure = error
            raise
        finally:
            workers.close()

    def refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> Any:
        state.rejected += 1
        return fastapi.responses.JSONResponse({"error": sentence}, status, headers)

    async def health(request: Any) -> Any:
        state.version, state.uptime_seconds = workers.version, round(time.monotonic() - started, 3)
        return fastapi.Response(protocol.encode(state, JSON), media_type=JSON)

    async def score(request: Any) -> Any:
        content_type = protocol.media_type(request.headers)
        try:
            message = protocol.read_request(await _read(request, config.limits.max_body_bytes), content_type, config.limits)
        except ProtocolError as error:
            return refuse(error.status, str(error))
        n = len(message.images)
        if state.queue + n > config.max_queue:
            return refuse(429, f"{state.queue} images wait already; try again", {"Retry-After": str(_retry_after(state))})
        state.queue += n
        state.requests += 1
        began = time.monotonic()
        try:
            scores = await workers.score(message.images, message.items)
        finally:
            state.queue -= n
            state.busy_seconds += time.monotonic() - began
        state.failed += sum(s.failed for s in scores)
        state.not_applicable += sum(not s.applies for s in scores)
        state.scored += sum(s.value is not None for s in scores)
        return fastapi.Response(protocol.write_response(message.id, state.scorer, scores, content_type), media_type=content_type)

    app = fastapi.FastAPI(title=f"xomni reward: {state.scorer}", version=str(SCHEMA), lifespan=lifespan)
    app.state.failure = None
    app.add_route("/health", health)
    app.add_route("/score", score, methods=["POST"])
    return app


def serve(config: ServiceConfig, host: str = "127.0.0.1", port: int = 8001) -> None:
    """Run a service until SIGTERM or Ctrl-C. ServiceError when the port is taken or the scorer cannot start."""
    uvicorn = need("uvicorn", config.scorer)
    os.environ.update(ONE_THREAD)  # inherited by the workers, whose numpy and OpenMP read it while they are imported
    listener = _listen(config.scorer, host, port)
    # uvicorn raises the signal again after an orderly shutdown; that must not look like a crash.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _leave)
    url = "http://{}:{}".format(*listener.getsockname()[:2])
    line = f"reward service {config.scorer} ({config.workers} workers) ready on {url}; stop it with Ctrl-C"
    app = create_app(config, ready=lambda: print(line, flush=True))
    # Requests in flight get a few seconds; after that their clients see a broken connection and retry on another replica.
    settings = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on", timeout_graceful_shutdown=5)
    try:
        with listener:
            uvicorn.Server(settings).run(sockets=[listener])
    finally:  # a failed start-up makes uvicorn exit with a code of its own
        if app.state.failure:
            raise app.state.failure


def _listen(scorer: str, host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ServiceError(f"--port {port} is no port; give a number from 1 to 65535, or 0 for a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            here = "use 127.0.0.1 for this machine alone, or 0.0.0.0 to let others in"
            raise ServiceError(f"--host {host} is no address of this machine ({error.strerror}); {here}") from None
        raise ServiceError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            f"stop what runs there or choose another: xomni serve-reward {scorer} --port {port % 65535 + 1}"
        ) from None
    return listener


def _leave(*_: Any) -> None:
    raise SystemExit(0)


async def _read(request: Any, limit: int) -> bytearray:
    """The body; refused as soon as it exceeds the limit, whatever its header says."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise protocol.TooLarge(f"the request is larger than {limit} bytes; send fewer images at once")
    return body


def _retry_after(state: Health) -> int:
    """Seconds until the queue is probably empty, 1 to 30."""
    done = state.scored + state.failed + state.not_applicable
    per_image = state.busy_seconds / done if done else 0.02
    return int(min(max(math.ceil(state.queue * per_image), 1), 30))
