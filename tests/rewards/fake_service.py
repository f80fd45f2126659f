"""A scoring service that misbehaves on request: each POST takes the next step of a script, the last step repeats."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgpack


class FakeService(ThreadingHTTPServer):
    """Steps: ok, slow, slow per image, null, error, any status, STATUS if bad, nan, far out, wrong count, other id, shuffled, no keys,
    other version, garbage, cut, drop, hang, trickle, trickling head. `about` is what /health says of the scorer.
    """

    daemon_threads = True

    def __init__(self, script: Sequence[str], scorer: str = "ocr", port: int = 0, **about: Any):
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.scorer, self.calls, self.lock, self.about = list(script), scorer, [], threading.Lock(), about
        self.messages: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_service(*script: str, scorer: str = "ocr", port: int = 0, **about: Any) -> Iterator[FakeService]:
    """A running FakeService."""
    service = FakeService(script, scorer, port, **about)
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
        self._answer(
            200, json.dumps({"scorer": self.server.scorer, "schema": 2, "accepts": ["application/msgpack"], **self.server.about}).encode()
        )

    def do_POST(self):
        """/score: the next step of the script. The score of an image is its first byte / 100."""
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self._score()
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _score(self):
        message = msgpack.unpackb(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            step = self.server.script[min(len(self.server.calls), len(self.server.script) - 1)]
            self.server.calls.append(len(message["images"]))
            self.server.messages.append(message | {"headers": dict(self.headers)})
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
        if step == "slow per image":
            time.sleep(0.06 * n)
        if step.endswith("if bad") and not any(image == b"bad" for image in message["images"]):
            step = "ok"
        if step[:3].isdigit():
            return self._answer(int(step[:3]), b"Some error", {"Retry-After": "0"} if step == "429" else {})
        if step == "garbage":
            return self._answer(200, b"\xc1\xc1\xc1")
        if step.startswith("nan"):
            scores[0] = float("nan")
        if step == "wrong count":
            scores, errors = scores[:-1], errors[:-1]
        if step == "null":
            scores = [None] * n
        if step == "error":
            scores[0], errors[0] = None, "the image is empty"
        keys, id = message["keys"], "other" if step == "other id" else message["id"]
        if step == "shuffled":
            keys, scores = keys[::-1], scores[::-1]
        if step == "no keys":
            keys = []
        if step == "far out":
            scores[0] = 1e30
        body = {"schema": 2, "id": id, "keys": keys, "scorer": self.server.scorer, "version": self.server.about.get("version", "")}
        if step == "other version":
            body["version"] = "other"
        answer = msgpack.packb(body | {"scores": scores, "errors": errors, "details": [{}] * len(scores)})
        if step == "cut":  # the connection breaks in the middle of the answer
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2])
            self.close_connection = True
            return
        self._answer(200, answer)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/msgpack", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
