"""Scoring services and a judge whose answers depend on the pixels and the question alone, so that runs can be repeated.

A score is a smooth function of the pixels: a colour that another CPU rounds otherwise moves it by about 1e-6.
"""

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
import numpy as np
from PIL import Image

WORDS = ("OPEN", "SALE", "fresh bread", "No text recognized", "欢迎光临", "it's", "Hot Tea")


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


def score(image: bytes, text: str = "") -> float:
    """From 0 to 1: the sine of the correlation of an encoded image with a wave; the text shifts it."""
    with Image.open(io.BytesIO(image)) as opened:
        pixels_YXC = np.asarray(opened.convert("RGB"), np.float64) / 255
    y, x, c = np.indices(pixels_YXC.shape)
    return float(0.5 + 0.5 * np.sin(40 * (pixels_YXC * np.sin(0.7 * y + 0.3 * x + c)).mean() + zlib.crc32(text.encode()) % 628 / 100))


def detail(image: bytes, item: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation reads of a score: text and correctness, and for GenEval the boxes of the classes that were asked for."""
    number = int(997 * score(image))
    found: dict[str, Any] = {"exact": number % 2 == 0, "colour_exact": number % 3 == 0, "text": WORDS[number % len(WORDS)]}
    if asked := item.get("targets", {}).get("detect"):
        boxes = [[9 * n + number % 16, 0, 9 * n + number % 16 + 8, 8] for n in range(len(asked["classes"]))]
        colour = ("red", "blue")[number % 2]
        found["detections"] = {name: [{"box": box, "score": 0.95, "color": colour}] for name, box in zip(asked["classes"], boxes)}
    return found


def reply(image: bytes, question: str) -> str:
    """What the judge says: yes or no where the question wants that, otherwise a text."""
    number = int(997 * score(image, question))
    return ("yes", "no", "yes")[number % 3] if "yes or no" in question else WORDS[number % len(WORDS)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """/health of a scoring service; /v1/models of the judge."""
        about = {"scorer": self.server.scorer, "schema": 2, "accepts": ["application/msgpack"], "version": "stub-1"}
        self._json(about | {"data": [{"id": "stub"}]})

    def do_POST(self) -> None:
        """/score of a scoring service; /v1/chat/completions of the judge."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.scorer == "judge":
            image, question = json.loads(body)["messages"][0]["content"]
            said = reply(base64.b64decode(image["image_url"]["url"].partition(",")[2]), question["text"])
            return self._json({"choices": [{"message": {"role": "assistant", "content": said}}]})
        asked = msgpack.unpackb(body)
        images, items = asked["images"], asked["items"]
        answer = {"schema": asked["schema"], "id": asked["id"], "keys": asked.get("keys", []), "version": "stub-1"}
        answer |= {"scorer": self.server.scorer, "scores": [score(image) for image in images]}
        answer |= {"errors": [None] * len(images), "details": [detail(*pair) for pair in zip(images, items, strict=True)]}
        self._answer("application/msgpack", msgpack.packb(answer))

    def _json(self, body: dict[str, Any]) -> None:
        self._answer("application/json", json.dumps(body).encode())

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
