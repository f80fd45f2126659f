"""Damaged requests over HTTP: a reward service answers each with 2xx or 4xx, and holds neither memory nor descriptors for them."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.benchmarks import machine
from tests.benchmarks.report import Report, machine_line
from tests.benchmarks.services import running
from tests.checkpoint.fuzzing import mutate
from tests.rewards.images import sign
from xomni_jax.rewards import protocol
from xomni_jax.rewards.protocol import JSON, MSGPACK, Request

THREADS, WARM = 4, 100


def run(count: int) -> Report:
    """`count` damaged bodies for the scorer shapes; memory and descriptors of the service after each hundred of them.

    Raises:
      ValueError: one is not answered, or with another status than 2xx or 4xx.
    """
    sound = {kind: [_body(n, kind) for n in (1, 2)] for kind in (MSGPACK, JSON)}

    def post(number: int) -> int:
        rng = random.Random(number)
        kind = rng.choice((MSGPACK, JSON))
        body = mutate(rng, rng.choice(sound[kind]), sound[kind])
        try:
            status = clients[number % THREADS].post(f"{url}/score", content=body, headers={"Content-Type": kind}).status_code
        except httpx.HTTPError as error:
            raise ValueError(f"body {number} got no answer: {type(error).__name__}: {error}") from error
        if not (200 <= status < 300 or 400 <= status < 500):
            raise ValueError(f"body {number} was answered with {status}")
        return status

    before = set(machine.family())
    with running({"shapes": 1}) as urls, ThreadPoolExecutor(THREADS) as threads:
        url, service, seen, most = urls["shapes"], sorted(set(machine.family()) - before), Counter[int](), (0.0, 0)
        clients = [httpx.Client(trust_env=False, timeout=60) for _ in range(THREADS)]
        for first in range(0, count, WARM):
            seen.update(threads.map(post, range(first, min(first + WARM, count))))
            now = machine.memory_and_descriptors(service)
            if not first:
                warm = now
            most = max(most[0], now[0]), max(most[1], now[1])
        for client in clients:
            client.close()
        health = httpx.get(f"{url}/health", trust_env=False).json()
    statuses = ", ".join(f"{status}: {n}" for status, n in sorted(seen.items()))
    lines = [
        f"rewards --bodies: {count} damaged requests to the service shapes, from {THREADS} connections",
        machine_line("threads: service 1", None),
        f"answers {statuses}; the service's status is {health['status']}",
        f"memory of its processes: {warm[0]:.0f} MB after {WARM} requests, {most[0]:.0f} MB at most",
        f"their open descriptors: {warm[1]}, {most[1]} at most",
    ]
    data = {"statuses": seen, "memory_mb": [warm[0], most[0]], "descriptors": [warm[1], most[1]], "status": health["status"]}
    return Report("\n".join(lines), {"benchmark": "rewards-bodies", "count": count, **data})


def _body(count: int, kind: str) -> bytes:
    items = [{"prompt": "a sign", "targets": {"background": "red", "shapes": [{"colour": "red", "shape": "circle", "count": 2}]}}] * count
    images = [protocol.encode_image(sign("A", 16, 24))] * count
    return protocol.encode(Request(schema=2, id="a1", keys=[f"k{n}" for n in range(count)], images=images, items=items), kind)
