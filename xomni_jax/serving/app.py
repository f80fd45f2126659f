"""The ASGI application of a service: routes, headers, refusals in OpenAI's form, the page."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from xomni_jax.core.http import LOOPBACK, BodyReader, Refusal, check_token, prometheus
from xomni_jax.serving import protocol
from xomni_jax.serving.options import FrontOptions
from xomni_jax.serving.protocol import error_body

TOKEN = "XOMNI_SERVE_TOKEN"  # environment variable with the bearer token
PAGE = Path(str(resources.files("xomni_jax"))) / "serving" / "page"
T = TypeVar("T")
Handler = Callable[[Any, Any], Awaitable[Any]]
_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_PAGE_FILES = frozenset(file.name for file in PAGE.glob("*") if file.suffix in _KINDS)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Site:
    """State and answers of one process. A subclass adds what it answers with.

    Args:
      local: it listens on this machine's own addresses alone; then other host names, which a web page could make up to reach it from a
        browser, are refused.
      log: where a line per request is printed, without prompts; None: nowhere.

    Attributes:
      posts, gets: handlers by path.
    """

    prefix = "xomni_serve"  # of its metrics

    def __init__(self, options: FrontOptions, local: bool, log: Any = sys.stderr):
        self.options, self.local, self.log = options, local, log
        self.token, self.status, self.started = os.environ.get(TOKEN, ""), "loading", time.monotonic()
        self.bodies = BodyReader(options.max_body_bytes, options.body_seconds, 8 * options.max_body_bytes, "send less at once")
        self.counts: Counter[str] = Counter()
        self.active = 0
        self.posts: dict[str, Handler] = {"/v1/images/variations": self.variations}
        self.gets: dict[str, Handler] = {
            "/": self.page, "/page/{file}": self.page, "/v1/models": self.models, "/v1/models/{name}": self.models,
            "/health": self.health, "/ready": self.health, "/metrics": self.metrics, "/openapi.json": self.description,
        }  # fmt: skip

    async def load(self) -> None:
        """Returns when it can answer."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends what runs beside the requests."""
        raise NotImplementedError

    def about_models(self) -> Mapping[str, dict[str, Any]]:
        """What GET /v1/models tells, by name."""
        raise NotImplementedError

    def known(self, name: str | None) -> str:
        """The model of a request, the first where it names none. Refusal (404) naming those there are."""
        models = self.about_models()
        if name is not None and name not in models:
            raise Refusal(404, f"there is no model {name[:80]!r} here; use one of {', '.join(models)}", 0)
        return next(iter(models)) if name is None else name

    async def body(self, request: Any, kind: str = "application/json") -> bytes:
        """The body of a request of a content type, after everything that can be refused without reading it."""
        check_token(request.headers, self.token, TOKEN)
        if self.status != "ok":
            raise Refusal(503, f"the service is {self.status}; try again", 5)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            raise Refusal(415, f"the body must be {kind}; send it with this Content-Type", 0)
        return await self.bodies.read(request)

    async def variations(self, request: Any, responses: Any) -> Any:
        """POST /v1/images/variations."""
        check_token(request.headers, self.token, TOKEN)
        raise Refusal(400, "images without a prompt are not drawn; use /v1/images/edits with a prompt and a mask", 0)

    async def models(self, request: Any, responses: Any) -> Any:
        """GET /v1/models and /v1/models/{name}."""
        check_token(request.headers, self.token, TOKEN)
        about = self.about_models()
        if name := request.path_params.get("name"):
            return responses.JSONResponse(about[self.known(name)])
        return responses.JSONResponse({"object": "list", "data": list(about.values())})

    def condition(self) -> dict[str, Any]:
        """What GET /health tells."""
        return {"status": self.status, "models": list(self.about_models()), "token": bool(self.token)}

    async def health(self, request: Any, responses: Any) -> Any:
        """GET /health and /ready."""
        told = self.condition()
        return responses.JSONResponse(told, 503 if request.url.path == "/ready" and told["status"] != "ok" else 200)

    def numbers(self) -> Iterable[tuple[str, str, float]]:
        """Counts of the subclass, for `prometheus`."""
        raise NotImplementedError

    async def metrics(self, request: Any, responses: Any) -> Any:
        """GET /metrics."""
        numbers = [("requests_total", "counter", self.counts["requests"]), ("gone_total", "counter", self.counts["gone"])]
        numbers += [(f'responses_total{{status="{k[1:]}"}}', "counter", v) for k, v in sorted(self.counts.items()) if k.startswith("=")]
        numbers += [("connections", "gauge", self.active), ("uptime_seconds", "gauge", round(time.monotonic() - self.started, 3))]
        numbers += [("ready", "gauge", int(self.condition()["status"] == "ok")), *self.numbers()]
        return responses.PlainTextResponse(prometheus(self.prefix, "", numbers))

    async def page(self, request: Any, responses: Any) -> Any:
        """GET / and /page/{file}: files of the package alone."""
        name = request.path_params.get("file", "index.html")
        if name not in _PAGE_FILES:
            raise Refusal(404, "there is no such file; the page is at /", 0)
        return responses.Response((PAGE / name).read_bytes(), media_type=_KINDS[Path(name).suffix])

    async def description(self, request: Any, responses: Any) -> Any:
        """GET /openapi.json."""
        return responses.JSONResponse(protocol.openapi())


def sse(kind: str, fields: Mapping[str, Any]) -> str:
    """A server-sent event; without fields the end of a stream."""
    return f"event: {kind}\n" * bool(kind) + f"data: {json.dumps(fields, ensure_ascii=False) if fields else '[DONE]'}\n\n"


async def until_gone(request: Any, answer: Awaitable[T]) -> T:
    """The answer, unless the client closes its connection first. Refusal (499) then. The body has been read."""
    task, gone = asyncio.ensure_future(answer), asyncio.create_task(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client has gone", 0)
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def create_app(state: Site, ready: Callable[[], None] = lambda: None, failed: Callable[[BaseException], None] = lambda error: None) -> Any:
    """The ASGI application; it loads when it starts. `ready` is called when it has, `failed` when it cannot."""
    from starlette import responses
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.routing import Route

    async def load() -> None:
        try:
            await state.load()
            state.status = "ok"
            ready()
        except Exception as error:  # noqa: BLE001 - the command says it
            failed(error)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            loading.cancel()
            state.status = "stopping"
            await state.close()

    def refused(status: int, sentence: str, retry: int = 0) -> Any:
        code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
        headers = {"Retry-After": str(retry)} if retry else None
        return responses.JSONResponse(error_body(status, sentence, code), status, headers)

    def route(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> Any:
            state.counts["requests"] += 1
            state.active += 1
            began = time.monotonic()
            try:
                host = request.headers.get("host", "").rpartition(":")[0].strip("[]") or request.headers.get("host", "")
                if state.local and host not in LOOPBACK:
                    raise Refusal(403, "this service answers to 127.0.0.1 and localhost alone; start it with --host for others", 0)
                told = await handler(request, responses)
            except Refusal as refusal:
                told = refused(*refusal.args)
                state.counts["gone"] += refusal.args[0] == 499
            except ValueError as error:  # one sentence of the model's own checks
                told = refused(400, str(error))
            except Exception as error:  # noqa: BLE001 - a fault of ours
                print(f"xomni serve: {request.url.path}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                told = refused(500, "the service has met a fault; its log says which")
            finally:
                state.active -= 1
            for name, value in _HEADERS.items():
                told.headers.setdefault(name, value)
            state.counts[f"={told.status_code}"] += 1
            if state.log and request.method == "POST":
                print(f"POST {request.url.path} {told.status_code} {time.monotonic() - began:.3f} s", file=state.log, flush=True)
            return told

        return answer

    async def not_found(request: Request, error: HTTPException) -> Any:
        words = {404: "there is no such path; see /openapi.json", 405: "this path takes another method; see /openapi.json"}
        told = refused(error.status_code, words.get(error.status_code, error.detail))
        told.headers.update(_HEADERS | dict(error.headers or {}))
        return told

    routes = [Route(path, route(handler), methods=["POST"]) for path, handler in state.posts.items()]
    routes += [Route(path, route(handler), methods=["GET"]) for path, handler in state.gets.items()]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: not_found})
