"""The HTTP server around one scorer: POST /score, GET /health. Worker processes score, so the event loop always answers."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import SCHEMA, Limits, ProtocolError, Response
from xomni_jax.rewards.services import worker
from xomni_jax.rewards.services.base import SCORERS, ServiceError, need

_SLICE = 8  # images handed to a worker at a time: small enough that requests share the workers fairly


@dataclass(frozen=True)
class ServiceConfig:
    """One service. `max_queue` bounds the images accepted and not yet scored."""

    scorer: str
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    max_queue: int = 1024
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ServiceError(f"scorer {self.scorer!r} is unknown; choose one of {', '.join(SCORERS)}")
        if self.workers < 1:
            raise ServiceError(f"--workers {self.workers} must be at least 1")
        if self.max_queue < self.limits.max_images:
            raise ServiceError(f"the queue of {self.max_queue} images is smaller than one request ({self.limits.max_images}); raise it")


class Workers:
    """Single-threaded worker processes, handed out one slice at a time; a worker that dies is replaced."""

    def __init__(self, config: ServiceConfig):
        self.config = config
        self.version = ""
        self._pools: list[ProcessPoolExecutor | None] = [None] * config.workers  # None: to be started before its next slice
        self._idle: asyncio.Queue[int] = asyncio.Queue()

    async def start(self) -> None:
        """Start every process and build its scorer. ServiceError when the scorer cannot start."""
        await asyncio.gather(*(self._pool(n) for n in range(self.config.workers)))
        for n in range(self.config.workers):
            self._idle.put_nowait(n)

    async def score(self, images: list[bytes], items: list[dict[str, Any]]) -> list[worker.Scored]:
        """Score a request, spread over the workers, in order."""
        slices = [slice(n, n + _SLICE) for n in range(0, len(images), _SLICE)]
        parts = await asyncio.gather(*(self._score_slice(images[s], items[s]) for s in slices))
        return [scored for part in parts for scored in part]

    def close(self) -> None:
        """End the processes; what they are doing is abandoned."""
        for pool in filter(None, self._pools):
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)

    async def _score_slice(self, images: list[bytes], items: list[dict[str, Any]]) -> list[worker.Scored]:
        n = await self._idle.get()
        try:
            pool = await self._pool(n)
            return await asyncio.wrap_future(pool.submit(worker.score, images, items, self.config.limits))
        except BrokenProcessPool:
            # Answered, not retried: the image that killed this worker would kill the next one.
            self._pools[n] = None
            return [worker.Scored(None, "the worker process died while scoring this slice", {}) for _ in images]
        finally:
            self._idle.put_nowait(n)

    async def _pool(self, n: int) -> ProcessPoolExecutor:
        """Worker n, started first when it has not been or has died."""
        pool = self._pools[n]
        if pool is None:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=worker.prepare, initargs=(os.getpid(),))
            try:
                self.version = await asyncio.wrap_future(pool.submit(worker.start, self.config.scorer, self.config.options))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            self._pools[n] = pool
        return pool


@dataclass
class Counts:
    """What a service has done since it started."""

    requests: int = 0
    scored: int = 0
    not_applicable: int = 0
    failed: int = 0
    rejected: int = 0
    queue: int = 0
    busy_seconds: float = 0.0


def create_app(config: ServiceConfig) -> Any:
    """The FastAPI application of one scorer; its workers start and end with it."""
    fastapi = need("fastapi", config.scorer)
    workers, counts, started = Workers(config), Counts(), time.monotonic()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            await workers.start()
            yield
        finally:
            workers.close()

    app = fastapi.FastAPI(title=f"xomni reward: {config.scorer}", version=str(SCHEMA), lifespan=lifespan)

    def refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> Any:
        counts.rejected += 1
        return fastapi.responses.JSONResponse({"error": sentence}, status, headers)

    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "schema": SCHEMA,
            "scorer": config.scorer,
            "version": workers.version,
            "workers": config.workers,
            "uptime_seconds": round(time.monotonic() - started, 3),
            **asdict(counts),
            "limits": asdict(config.limits),
        }

    async def score(request: Any) -> Any:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            body = await _read(request, config.limits.max_body_bytes)
            message = protocol.decode_request(body, content_type, config.limits)
        except ProtocolError as error:
            return refuse(error.status, str(error))
        n = len(message.images)
        if counts.queue + n > config.max_queue:
            return refuse(429, f"{counts.queue} images wait already; try again", {"Retry-After": str(_retry_after(counts))})
        counts.queue += n
        counts.requests += 1
        began = time.monotonic()
        try:
            scored = await workers.score(message.images, message.items)
        finally:
            counts.queue -= n
            counts.busy_seconds += time.monotonic() - began
        counts.failed += sum(s.error is not None for s in scored)
        counts.not_applicable += sum(s.error is None and s.score is None for s in scored)
        counts.scored += sum(s.score is not None for s in scored)
        columns = [list(c) for c in zip(*scored)] if scored else [[], [], []]
        answer = protocol.encode_response(Response(message.id, config.scorer, *columns), content_type)
        return fastapi.Response(answer, media_type=content_type)

    score.__annotations__["request"] = fastapi.Request  # fastapi is imported only when a service runs
    app.get("/health")(health)
    app.post("/score")(score)
    return app


def serve(config: ServiceConfig, host: str = "127.0.0.1", port: int = 8001) -> None:
    """Run a service until SIGTERM or Ctrl-C. ServiceError when the port is taken or the scorer cannot start."""
    uvicorn = need("uvicorn", config.scorer)
    os.environ.update(worker.ONE_THREAD)  # before the workers are born: numpy and OpenMP read it when they are loaded
    listener = _listen(config.scorer, host, port)
    # uvicorn raises the signal again once it has shut down in good order; that must not look like a crash.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _leave)
    app, failures = create_app(config), []
    app.router.lifespan_context = _announce(app.router.lifespan_context, config, listener, failures)
    # In flight when the end comes: a few seconds to finish, then the client hears a broken connection and retries elsewhere.
    settings = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on", timeout_graceful_shutdown=5)
    try:
        with listener:
            uvicorn.Server(settings).run(sockets=[listener])
    finally:  # uvicorn leaves with its own exit code when start-up fails
        if failures:
            raise failures[0]


def _announce(inner: Any, config: ServiceConfig, listener: socket.socket, failures: list[Exception]) -> Any:
    """The app's lifespan, saying where it listens once the workers are ready, and keeping the error when they are not."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        url = "http://{}:{}".format(*listener.getsockname()[:2])
        try:
            async with inner(app) as state:
                print(
                    f"reward service {config.scorer} ({config.workers} workers) ready on {url}; stop it with Ctrl-C",
                    flush=True,
                )
                yield state
        except ServiceError as error:
            failures.append(error)
            raise

    return lifespan


def _listen(scorer: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServiceError(
            f"port {port} on {host} cannot be used ({getattr(error, 'strerror', None) or error}); "
            f"stop what runs there or choose another: xomni serve-reward {scorer} --port {port % 65535 + 1}"
        ) from error
    return listener


def _leave(*_: Any) -> None:
    raise SystemExit(0)


async def _read(request: Any, limit: int) -> bytes:
    """The body, given up as soon as it is over the limit, whatever its header says."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise protocol.TooLarge(f"the request is larger than {limit} bytes; send fewer images at once")
        parts.append(part)
    return b"".join(parts)


def _retry_after(counts: Counts) -> int:
    """Seconds until the queue is probably worked off, 1 to 30."""
    done = counts.scored + counts.failed + counts.not_applicable
    per_image = counts.busy_seconds / done if done else 0.02
    return int(min(max(math.ceil(counts.queue * per_image), 1), 30))
