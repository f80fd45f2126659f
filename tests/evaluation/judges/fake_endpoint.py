"""A chat endpoint that misbehaves on request: each POST takes the next step of a script, the last step repeats."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint(ThreadingHTTPServer):
    """A server of scripted replies; `asked` keeps every body.

    Steps: a choice as a dict, a function from the body to one, "say TEXT", "by content" (yes or no), slow, 400, 401, 429, 500,
    garbage, "no choice", "two choices", "no text", drop, hang.
    """

    daemon_threads = True

    def __init__(self, script: Sequence[str | dict | Callable[[dict], dict]], models: Sequence[str] | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models, self.asked, self.headers, self.lock = list(script), models, [], [], threading.Lock()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def fake_endpoint(*script: str | dict | Callable[[dict], dict], models: Sequence[str] | None = ("tiny-vlm",)) -> Iterator[FakeEndpoint]:
    """A running FakeEndpoint."""
    endpoint = FakeEndpoint(script, models)
    threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.released.set()
        endpoint.shutdown()
        endpoint.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def do_GET(self):
        """/v1/models."""
        if self.server.script[0] == "401":
            return self._answer(401, {})
        if self.server.models is None:
            return self._answer(404, {})
        self._answer(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        """/v1/chat/completions: the next step of the script."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            step = self.server.script[min(len(self.server.asked), len(self.server.script) - 1)]
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
        if callable(step):
            step = step(body)
        if isinstance(step, dict):
            self._answer(200, {"choices": [step]})
            return
        choice = {"message": {"role": "assistant", "content": step.removeprefix("say ")}}
        if step in ("hang", "drop"):
            if step == "hang":
                self.server.released.wait(20)
            self.close_connection = True
        elif step in ("400", "429", "500"):
            self._answer(int(step), {"error": "a sentence from the server"}, {"Retry-After": "0"})
        elif step == "garbage":
            self._answer(200, b"<html>")
        elif step == "by content":  # the same question about the same image has the same reply, whenever it is asked
            choice["message"]["content"] = ("no", "yes")[zlib.crc32(json.dumps(body).encode()) % 2]
            self._answer(200, {"choices": [choice]})
        elif step == "slow":
            time.sleep(0.3)
            self._answer(200, {"choices": [choice]})
        else:
            choices = {"no choice": [], "two choices": [choice] * 2, "no text": [{"message": {"content": None}}]}
            self._answer(200, {"choices": choices.get(step, [choice])})

    def _answer(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
