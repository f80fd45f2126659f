"""What a service costs: images per second and latencies at 1, 8 and 32 clients, against the same model drawn in a plain batch."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, duration, machine_line
from tests.benchmarks.services import process, url_of
from xomni_jax.core.tables import aligned
from xomni_jax.pipeline import XOmni

CLIENTS, SLOTS = (1, 8, 32), 16
PROMPT = 'a red sign that says "HELLO"'


def run(model: str, seconds: float) -> Report:
    """Clients that ask for one image after the other; then, with the service ended, batches of as many images as there are slots."""
    before, each, rows = machine.load(), seconds / (len(CLIENTS) + 2), []
    with process("serve", "--model", model, "--slots", str(SLOTS), "--quiet") as (started, errors):
        url = url_of("serve", started, errors)
        clients(url, CLIENTS[-1], 2.0)
        for count in CLIENTS:
            latencies, took = clients(url, count, each)
            rows.append((count, len(latencies) / took, *np.percentile(latencies, (50, 95, 99))))
    plain, alone = (batches(XOmni(model), size, each) for size in (SLOTS, 1))
    table = [("clients", "images/s", "of the plain batch", "p50", "p95", "p99")]
    table += [(str(count), f"{rate:.3g}", f"{rate / plain:.2f}", *map(duration, tail)) for count, rate, *tail in rows]
    lines = [
        f"serve: {SLOTS} slots, clients that ask for one image of the model's own size after the other",
        machine_line("service and clients share the cores", None)
        + ("" if None in (before, machine.load()) else f"; load {before:g} before"),
        "", aligned(table), "",
        f"In this process, without a service: {plain:.3g} images/s in batches of {SLOTS}, {alone:.3g} one at a time "
        f"(32 clients: {rows[-1][1] / alone:.2f} of that).",
    ]  # fmt: skip
    names = ("clients", "images_per_s", "p50_s", "p95_s", "p99_s")
    data = {
        "slots": SLOTS,
        "served": [dict(zip(names, map(float, row))) for row in rows],
        "batch_images_per_s": plain,
        "single_images_per_s": alone,
    }
    return Report("\n".join(lines), {"benchmark": "serve", "versions": machine.versions(OURS), "machine": machine.describe(), **data})


def clients(url: str, count: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each request that so many clients made, one after the other for `seconds`, and what it all took."""
    latencies: list[float] = []
    began = time.perf_counter()

    def one(number: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            seed = number * 100_000
            while time.perf_counter() < began + seconds:
                sent, seed = time.perf_counter(), seed + 1
                client.post("/v1/images/generations", json={"prompt": PROMPT, "seed": seed}).raise_for_status()
                latencies.append(time.perf_counter() - sent)

    _together(one, count)
    return latencies, time.perf_counter() - began


def batches(model: XOmni, size: int, seconds: float) -> float:
    """Images per second of the pipeline in batches of `size`, without the first."""
    model.generate([PROMPT] * size, batch_size=size)
    began, drawn = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        drawn += len(model.generate([PROMPT] * size, seed=drawn, batch_size=size, decode_batch_size=size))
    return drawn / (time.perf_counter() - began)


def mixed(model: str, seconds: float, count: int = 16) -> Report:
    """Images, streams and answers by clients of which some vanish, and the memory of the service at the beginning and the end."""
    with process("serve", "--model", model, "--slots", "8", "--quiet") as (started, errors):
        url = url_of("serve", started, errors)
        _together(lambda n: _mixed_client(url, n, time.perf_counter() + min(60.0, seconds / 4), Counter()), count)  # compiles
        memory, met = [_memory(started.pid)], Counter[str]()
        end = time.perf_counter() + seconds
        threads = [threading.Thread(target=_mixed_client, args=(url, n, end, met)) for n in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(5.0, seconds / 20))
            memory.append(_memory(started.pid))
        health = httpx.get(url + "/health", trust_env=False).json()
    tenth = max(1, len(memory) // 10)
    first, last = (float(np.mean(part)) for part in (memory[:tenth], memory[-tenth:]))
    lines = [
        f"serve --faults: {count} clients for {duration(seconds)}: {sum(met.values())} requests",
        ", ".join(f"{name} {n}" for name, n in sorted(met.items())),
        f"left afterwards: {health['queue']} waiting, {health['running']} in slots",
        f"memory of the service: {first:.0f} MB in the first tenth, {last:.0f} MB in the last",
    ]
    data: dict[str, Any] = {"met": dict(met), "memory_mb": memory, "queue": health["queue"], "running": health["running"]}
    return Report("\n".join(lines), {"benchmark": "serve-faults", **data})


def _mixed_client(url: str, number: int, end: float, met: Counter[str]) -> None:
    rng = random.Random(number)
    message = {"messages": [{"role": "user", "content": "what is this?"}], "max_tokens": 16}
    while time.perf_counter() < end:
        kind = rng.choice(("image", "stream", "vanish", "answer", "wrong"))
        body = {"prompt": PROMPT, "seed": rng.getrandbits(31), "n": rng.choice((1, 2, 4))}
        path = "/v1/chat/completions" if kind == "answer" else "/v1/images/generations"
        body = message if kind == "answer" else body | {"size": "7x7"} if kind == "wrong" else body
        patience = rng.uniform(0.02, 0.3) if kind == "vanish" else 120
        with httpx.Client(base_url=url, trust_env=False, timeout=patience) as client:
            with suppress(httpx.TimeoutException):
                answer = client.post(path, json=body | {"stream": True, "partial_images": 2} if kind == "stream" else body)
                done = answer.status_code == (400 if kind == "wrong" else 200) and (
                    kind != "stream" or answer.text.count("completed\n") == body["n"]
                )
                met[f"{kind}: " + ("done" if done else f"ANSWERED {answer.status_code}")] += 1
                continue
            met[f"{kind}: left" if kind == "vanish" else f"{kind}: LOST"] += 1


def _memory(pid: int) -> float:
    """Resident MB of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _together(fn: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=fn, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
