"""A scoring service that misbehaves on request: each POST takes the next step of a script, the last step repeats."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgpack


class FakeService(ThreadingHTTPServer):
    """Steps: ok, slow, null, error, 500, 400 if bad, 429, nan, wrong count, other id, garbage, drop, hang, trickle, trickling head."""

    daemon_threads = True

    def __init__(self, script: Sequence[str], scorer: str = "ocr"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.scorer, self.calls, self.lock = list(script), scorer, [], threading.Lock()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_service(*script: str, scorer: str = "ocr") -> Iterator[FakeService]:
    """A running FakeService."""
    service = FakeService(script, scorer)
    threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield service
    finally:
        service.released.set()
        service.shutdown()
        service.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def do_GET(self):
        """/health."""
        self._answer(200, json.dumps({"scorer": self.server.scorer, "schema": 1}).encode())

    def do_POST(self):
        """/score: the next step of the script. The score of an image is its first byte / 100."""
        message = msgpack.unpackb(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            step = self.server.script[min(len(self.server.calls), len(self.server.script) - 1)]
            self.server.calls.append(len(message["images"]))
        n = len(message["images"])
        scores, errors = [image[0] / 100 for image in message["images"]], [None] * n
        if step in ("hang", "drop"):
            if step == "hang":
                self.server.released.wait(20)
            self.close_connection = True
            return
        if step in ("trickle", "trickling head"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            if step == "trickle":
                self.end_headers()
            else:
                self.flush_headers()
                self.wfile.write(b"Name: ")
            while not self.server.released.wait(0.05):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
            return
        if step == "slow":
            time.sleep(0.3)
        if step == "400 if bad" and any(image == b"bad" for image in message["images"]):
            return self._answer(400, b'{"error": "images[0] is bad"}')
        if step == "500":
            return self._answer(500, b"Internal Server Error")
        if step == "429":
            return self._answer(429, b"{}", {"Retry-After": "0"})
        if step == "garbage":
            return self._answer(200, b"\xc1\xc1\xc1")
        if step == "nan":
            scores[0] = float("nan")
        if step == "wrong count":
            scores, errors = scores[:-1], errors[:-1]
        if step == "null":
            scores = [None] * n
        if step == "error":
            scores[0], errors[0] = None, "the image is empty"
        body = {"schema": 1, "id": "other" if step == "other id" else message["id"], "scorer": self.server.scorer}
        self._answer(200, msgpack.packb(body | {"scores": scores, "errors": errors, "details": [{}] * len(scores)}))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/msgpack", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
