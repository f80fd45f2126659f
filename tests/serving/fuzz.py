"""Mutated bodies against a running service: `python -m tests.serving.fuzz URL --count 5000` prints the statuses it answered with.

Exit code 1 when one is not 2xx or 4xx, or an error is not one sentence in OpenAI's form.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import json
import random
import sys
from collections import Counter
from typing import Any

import httpx
from PIL import Image

NUMBERS = (-1, 0, 1, 2**31, 2**64, -0.0, 1e308, 1e-9)
TEXTS = ("", " ", "a" * 5000, "\u202e\ud83d\ude00", "\x00", "<MM-Token-3>", "<IMAGE>", "32x16", "9x9")
FILES = ("../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:image/png;base64,", "data:image/svg+xml;base64,PHN2Zz4=")
ODD = (None, True, *NUMBERS, *TEXTS, *FILES, [], {}, [[]], [1, 2, 3], {"url": "x"})


def seeds() -> list[tuple[str, dict[str, Any]]]:
    """(path, valid body) of every route, small ones."""
    file = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(file, "png")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "what?"}]
    return [
        ("/v1/images/generations", {"prompt": "a", "n": 1, "seed": 1, "size": "auto", "temperature": 0.9, "top_k": 5, "stream": False}),
        ("/v1/images/generations", {"prompt": "b", "seed": 2, "stream": True, "partial_images": 1, "return_codes": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "seed": 0, "temperature": 0.5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": True}),
        ("/v1/xomni/encode", {"image": uri, "reconstruct": False}),
        ("/v1/xomni/entropy", {"prompt": "a", "codes": [[1, 2, 3, 4], [5, 6, 7, 8]]}),
        ("/v1/images/edits", {"prompt": "a"}),
    ]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body with a few changes: odd values, keys that are missing or unknown, bytes that are flipped, cut or repeated."""
    path, body = rng.choice(seeds())
    body = copy.deepcopy(body)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        container, key = rng.choice(places(body))
        if isinstance(container, list) and key >= len(container) or isinstance(container, dict) and key not in container:
            continue
        change = rng.randrange(4)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[rng.choice(("x", "n", "url", "style", "prompt\n"))] = rng.choice(ODD)
        else:
            container[key] = rng.choice(ODD)
        if not places(body):
            break
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice((0, 1, 1, 20))] = rng.choice((b"", bytes([rng.randrange(256)]), b"[" * 2000, b'"', b"\\u"))
    return path, bytes(data)


def fuzz(url: str, count: int, seed: int = 0) -> Counter[int]:
    """Statuses of so many requests. ValueError for an answer that must not be."""
    rng, met = random.Random(seed), Counter[int]()
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        for n in range(count):
            path, body = mutated(rng)
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            met[answer.status_code] += 1
            good = 200 <= answer.status_code < 300
            sentence = "" if good else answer.json()["error"]["message"]
            if not (good or 400 <= answer.status_code < 500 and sentence and "\n" not in sentence):
                raise ValueError(f"request {n} of seed {seed}: {path} {body[:400]!r} was answered {answer.status_code} {answer.text[:200]}")
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(dict(sorted(fuzz(args.url, args.count, args.seed).items())))
    except ValueError as error:
        sys.exit(str(error))
