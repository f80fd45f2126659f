"""A service in a thread, and a proxy in front of it that breaks requests and answers in every way a network and a machine can."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import msgspec
import uvicorn

from xomni_jax.rewards import Score, server

FAULTS = (
    "refused", "reset", "hang", "500", "503", "429", "drip", "wrong count", "nan", "wrong order", "other id", "truncated", "garbage",
    "late",
)  # fmt: skip


def pixel_score(file: bytes) -> float:
    """A score of an image's bytes alone, so that runs can be repeated."""
    return zlib.crc32(file) / 2**32


class InlineWorkers:
    """Scores in the service's own process: `score(file)`, after `seconds` for a request."""

    version, model_hash, images, seconds_busy = "1", "", 0, 0.0

    def __init__(self, score: Callable[[bytes], float] = pixel_score, seconds: float = 0.0):
        self.of, self.seconds, self.scored = score, seconds, Counter[bytes]()

    async def start(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""

    def slowest(self) -> float:
        """No worker hangs."""
        return 0.0

    async def score(self, images: list[bytes], items: list[Any], progress: float | None, state: bytes) -> tuple[list[Score], bytes]:
        """See Workers."""
        await asyncio.sleep(self.seconds)
        self.scored.update(images)
        return [Score(self.of(image)) for image in images], b""


@contextmanager
def inline_service(scorer: str = "ocr", workers: InlineWorkers | None = None, **config: Any) -> Iterator[SimpleNamespace]:
    """A real service without processes: (url, service, workers)."""
    workers = workers or InlineWorkers()
    with mock.patch.object(server, "Workers", lambda *_: workers):
        app = server.create_app(server.ServiceConfig(scorer, **config))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", access_log=False, timeout_keep_alive=75))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started or app.state.service.state.status == "loading":
        time.sleep(0.01)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield SimpleNamespace(url=url, service=app.state.service, workers=workers)
    finally:
        running.should_exit = running.force_exit = True
        thread.join()


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on to `upstream`; a share of the posts meets a fault, drawn from `faults`. `down` refuses everything.

    Attributes:
      met: how often each fault was injected.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, upstream: str, share: float, faults: tuple[str, ...] = FAULTS, seed: int = 0, slow: float = 1.0):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.upstream, self.share, self.faults, self.slow = upstream, share, faults, slow
        self.random, self.lock, self.met, self.down = random.Random(seed), threading.Lock(), Counter[str](), False
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.http = httpx.Client(trust_env=False, verify=False, timeout=60)

    def draw(self) -> str:
        """The fault of the next post, or ""."""
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else ""
            if fault:
                self.met[fault] += 1
            return fault


@contextmanager
def fault_proxy(upstream: str, share: float, **options: Any) -> Iterator[FaultProxy]:
    """A running FaultProxy."""
    proxy = FaultProxy(upstream, share, **options)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """Passed on, unless all is down."""
        if self.server.down:
            return self._reset()
        answer = self.server.http.get(self.server.upstream + self.path)
        self._answer(answer.status_code, answer.content, "application/json")

    def do_POST(self) -> None:
        """Passed on, or not, or not quite."""
        fault = self.server.draw()
        if fault == "refused" or self.server.down:
            return self._reset()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fault in ("500", "503", "429"):
            return self._answer(int(fault), b"injected", "text/plain", {"Retry-After": "0"} if fault == "429" else {})
        if fault == "hang":
            time.sleep(self.server.slow)
            return self._reset()
        headers = {"Content-Type": self.headers["Content-Type"]}
        answer = self.server.http.post(self.server.upstream + self.path, content=body, headers=headers)
        content = _damaged(answer.content, fault) if answer.status_code == 200 else answer.content
        if fault == "late":  # the service has scored, and the client no longer waits
            time.sleep(self.server.slow)
        self._answer(answer.status_code, content, answer.headers["content-type"], fault=fault)

    def _answer(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None, fault: str = "") -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "drip":
                end = time.monotonic() + self.server.slow
                while time.monotonic() < end:
                    self.wfile.write(content[:1])
                    time.sleep(0.05)
                return self._reset()
            if fault in ("reset", "truncated"):
                self.wfile.write(content[: len(content) // 2])
                return self._reset(hard=fault == "reset")
            self.wfile.write(content)
        except OSError:
            self.close_connection = True

    def _reset(self, hard: bool = True) -> None:
        self.close_connection = True
        if hard:  # without the orderly end of a connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile.close()


def _damaged(content: bytes, fault: str) -> bytes:
    """An answer after a fault of the service."""
    answer = msgspec.msgpack.decode(content)
    if fault == "garbage":
        return content[::-1]
    if fault == "wrong count":
        answer["scores"] = answer["scores"][:-1]
    if fault == "nan":
        answer["scores"][0] = float("nan")
    if fault == "wrong order":
        for name in ("keys", "scores", "errors", "details"):
            answer[name].reverse()
    if fault == "other id":
        answer["id"] = "another"
    return msgspec.msgpack.encode(answer)
