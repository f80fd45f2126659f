"""How long the engine takes to have 240 questions answered by a judge that answers at once: what is left is our own time."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ITEMS, QUESTIONS, SIDE = 5, 12, 1152  # four images per item, so many questions about each, as in DPG-Bench
FORMATS = ("PNG", "JPEG", "WEBP")
_REPLY = b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}'


def measure() -> list[dict[str, Any]]:
    """Seconds for all questions, by the format in which images are sent."""
    from xomni_jax.evaluation.judges.preparation import ChatOptions
    from xomni_jax.evaluation.run import EvalConfig, evaluate
    from xomni_jax.evaluation.suite import Item, Suite, write_image

    class Questions(Suite):
        """Twelve questions about each of four images."""

        judge, repeats = "vqa", 4

        def load(self, data: Path) -> list[Item]:
            return [Item(str(n), "a sign") for n in range(ITEMS)]

        def questions(self, item: Item) -> list[Any]:
            return [{"instruction": f"Is it {n}?", "max_tokens": 8, "answers": ["yes", "no"]} for n in range(QUESTIONS)]

        def score(self, item: Item, outputs: Any) -> dict[str, Any]:
            right = [reply == "yes" for replies in outputs for reply in replies]
            return {"score": sum(right) / len(right), "verdicts": ["yes"] * len(outputs), "unparsed": 0}

        def aggregate(self, records: Any) -> dict[str, Any]:
            return {"headline": "yes", "scores": {"yes": sum(r["score"] for r in records) / len(records)}, "categories": {}}

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(ITEMS):
            for k in range(4):
                write_image(Path(folder) / f"{n}_{k}.png", _image(4 * n + k))
        server = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.judging"], stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().strip()
            for kind in FORMATS:
                out = Path(folder) / kind
                out.mkdir()
                (out / "images").symlink_to(folder)
                chat = ChatOptions(image_format=kind)
                config = EvalConfig(Questions(), out, phase="score", judges={"vqa": f"instant@{url}"}, chat=chat, report=False)
                began, cpu = time.perf_counter(), time.process_time()
                evaluate(config)
                spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
                results.append({"format": kind, "questions": 4 * ITEMS * QUESTIONS, **spent})
        finally:
            server.kill()
            server.wait()
    return results


def _image(seed: int) -> Image.Image:
    """As hard to compress as a photograph: smooth areas and fine noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(smooth, np.float64) + noise).clip(0, 255).astype(np.uint8))


class _Instant(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """The list of models."""
        self._answer(b'{"data": [{"id": "instant"}]}')

    def do_POST(self) -> None:
        """Yes."""
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read1(min(left, 1 << 20)))
        self._answer(_REPLY)

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Instant)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    threading.Thread(target=server.serve_forever).start()
