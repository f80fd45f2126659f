"""Scoring services and a judge whose answers depend on the pixels (and the question) alone, so that runs can be repeated."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgpack
from PIL import Image

WORDS = ("OPEN", "SALE", "fresh bread", "No text recognized", "欢迎光临", "yes", "no", "Hot Tea")


@contextlib.contextmanager
def serving(name: str) -> Iterator[str]:
    """The URL of a scoring service called `name`, or of the chat endpoint "judge"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.scorer = True, name
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def checksum(image: bytes, text: str = "") -> int:
    """Of the pixels, whatever the file format, and a text."""
    with Image.open(io.BytesIO(image)) as opened:
        return zlib.crc32(opened.convert("RGB").tobytes() + text.encode())


def detail(image: bytes, item: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation reads of a score: text and correctness, and for GenEval the boxes of the classes that were asked for."""
    number = checksum(image)
    found: dict[str, Any] = {"exact": number % 2 == 0, "colour_exact": number % 3 == 0, "text": WORDS[number % len(WORDS)]}
    if asked := item.get("targets", {}).get("detect"):
        left, box = number % 16, {"score": 0.95, "color": "red"}
        found["detections"] = {kind: [box | {"box": [left + 9 * n, 0, left + 9 * n + 8, 8]}] for n, kind in enumerate(asked["classes"])}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """/health of a scoring service; /v1/models of the judge."""
        health = {"scorer": self.server.scorer, "schema": 1, "version": "stub-1"}
        self._answer("application/json", json.dumps({"data": [{"id": "stub"}]} if self.server.scorer == "judge" else health).encode())

    def do_POST(self) -> None:
        """/score of a scoring service; /v1/chat/completions of the judge."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.scorer == "judge":
            picture, question = json.loads(body)["messages"][0]["content"]
            number = checksum(base64.b64decode(picture["image_url"]["url"].partition(",")[2]), question["text"])
            reply = ("yes", "no", "yes")[number % 3] if "yes" in question["text"].lower() else WORDS[number % len(WORDS)]
            choice = {"message": {"role": "assistant", "content": reply}}
            return self._answer("application/json", json.dumps({"choices": [choice]}).encode())
        asked = msgpack.unpackb(body)
        images, items = asked["images"], asked["items"]
        answer = {"schema": 1, "id": asked["id"], "scorer": self.server.scorer, "scores": [checksum(image) / 2**32 for image in images]}
        answer |= {"errors": [None] * len(images), "details": [detail(*pair) for pair in zip(images, items, strict=True)]}
        return self._answer("application/msgpack", msgpack.packb(answer))

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
