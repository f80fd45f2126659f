"""The ASGI application around `server.App`: routes, headers, refusals in OpenAI's form."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from xomni_jax.core.http import LOOPBACK, Refusal
from xomni_jax.serving import protocol
from xomni_jax.serving.protocol import error_body
from xomni_jax.serving.server import App

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def create_app(state: App, ready: Callable[[], None] = lambda: None, failed: Callable[[BaseException], None] = lambda error: None) -> Any:
    """The ASGI application; models load when it starts. `ready` is called when they have, `failed` when they cannot."""
    from starlette import responses
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.routing import Route

    async def load() -> None:
        try:
            await asyncio.to_thread(state.service.warm)
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
            await asyncio.to_thread(state.service.scheduler.close)

    def refused(status: int, sentence: str, retry: int = 0) -> Any:
        code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
        headers = {"Retry-After": str(retry)} if retry else None
        return responses.JSONResponse(error_body(status, sentence, code), status, headers)

    def route(handler: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
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

    async def description(request: Any, responses: Any) -> Any:
        return responses.JSONResponse(protocol.openapi())

    posts = {
        "/v1/images/generations": state.generate, "/v1/images/edits": state.edits, "/v1/images/variations": state.edits,
        "/v1/chat/completions": state.chat, "/v1/xomni/encode": state.encode, "/v1/xomni/entropy": state.entropy,
    }  # fmt: skip
    gets = {
        "/": state.page, "/page/{file}": state.page, "/v1/models": state.models, "/v1/models/{name}": state.models, "/health": state.health,
        "/v1/xomni/images/{name}.png": state.image, "/ready": state.health, "/metrics": state.metrics, "/openapi.json": description,
    }  # fmt: skip
    routes = [Route(path, route(handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, route(handler), methods=["GET"]) for path, handler in gets.items()]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: not_found})
