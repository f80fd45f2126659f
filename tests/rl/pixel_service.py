"""A reward service in a thread of the test: an image's score depends on its bytes alone, so that runs can be repeated.

One of whole sets remembers the images of earlier requests, in the state that it gets with the next one.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgpack


class PixelService(ThreadingHTTPServer):
    """`fails(call)` says whether the first image of a request cannot be scored; `before(call)` runs before each answer."""

    daemon_threads = True

    def __init__(self, scorer: str, fails: Callable[[int], bool], before: Callable[[int], None], scope: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scope, self.states = scope, list[bytes]()
        self.scorer, self.fails, self.before, self.calls = scorer, fails, before, 0
        self.score: Callable[[bytes], float] = lambda image: zlib.crc32(image) / 2**32
        self.heard: Callable[[list[bytes]], None] = lambda images: None
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def pixel_service(
    scorer: str = "ocr",
    fails: Callable[[int], bool] = lambda call: False,
    before: Callable[[int], None] = lambda call: None,
    scope: str = "image",
) -> Iterator[PixelService]:
    """A running PixelService."""
    service = PixelService(scorer, fails, before, scope)
    threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Silent."""

    def do_GET(self):
        """/health."""
        about = {"scorer": self.server.scorer, "schema": 2, "accepts": ["application/msgpack"], "scope": self.server.scope}
        self._answer("application/json", json.dumps(about).encode())

    def do_POST(self):
        """/score."""
        message = msgpack.unpackb(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls += 1
        self.server.heard(message["images"])
        self.server.before(self.server.calls)
        before = message.get("state", b"")
        scores: list[float | None] = [self.server.score(image + before) for image in message["images"]]
        errors: list[str | None] = [None] * len(scores)
        if self.server.fails(self.server.calls):
            scores[0], errors[0] = None, "the image is empty"
        same = {name: message[name] for name in ("schema", "id", "keys")}
        body = same | {"scorer": self.server.scorer, "scores": scores, "errors": errors}
        if self.server.scope == "set":
            self.server.states.append(before)
            body["state"] = zlib.crc32(b"".join(message["images"]), zlib.crc32(before)).to_bytes(4, "big")
        self._answer("application/msgpack", msgpack.packb(body | {"details": [{}] * len(scores)}))

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
