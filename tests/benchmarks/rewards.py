"""What the way between trainer and reward service costs: transport, overlap with other work, and a GRPO run under injected faults."""

from __future__ import annotations

import dataclasses
import threading
import time
from statistics import median
from typing import Any

import jax
import numpy as np

from tests.benchmarks import machine
from tests.benchmarks.faults import InlineWorkers, fault_proxy, inline_service
from tests.benchmarks.grpo import Trainer
from tests.benchmarks.report import OURS, Report, duration, machine_line
from tests.benchmarks.services import running
from tests.rewards.images import ocr_item, sign
from xomni_jax.core.tables import aligned
from xomni_jax.rewards import protocol
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.scorer import build_scorer
from xomni_jax.rewards.workers import score_files
from xomni_jax.rl import grpo
from xomni_jax.rl.rewards import RewardConfig
from xomni_jax.sharding.mesh import make_mesh

BATCH, GRAINS = 32, (0.0, 2.0)
SIDES = {96: 8, 256: 8, 1152: 4}  # images of a chunk: the worker begins when the first of them are files and sent
PIPELINED = {"concurrency": 4, "timeout": 600.0}  # some images are made into files while others are scored
PATIENT = {"chunk": 1, "concurrency": 8, "backoff": 0.002, "timeout": 5.0, "max_wait": 180.0, "attempts": 100}


def run(repeats: int, seconds: float) -> Report:
    """Transport of 32 images of each kind with the scorer ocr, and overlap with a service that takes 2 s for a batch."""
    before, sizes = machine.load(), []
    with running({"ocr": 1}) as urls:
        for side, chunk in SIDES.items():
            with RewardClient("ocr", urls["ocr"], chunk=chunk, **PIPELINED) as client:
                sizes += [transport(client, side, grain, repeats, seconds / len(SIDES) / len(GRAINS)) for grain in GRAINS]
    step = overlap(2.0, 12)
    rows = [
        (
            f"{BATCH} images of",
            "kB each",
            "rapidocr alone",
            "scorer alone",
            "through the service",
            "transport",
            "of processor time",
            "images a core second",
        )
    ]
    for x in sizes:
        shares = (f"{x[name]:.1%}" for name in ("transport", "beside"))
        name = f"{x['side']} px" + " with grain" * bool(x["grain"])
        seconds = (duration(x[part]) for part in ("engine_s", "alone_s", "wall_s"))
        rows.append((name, f"{x['kilobytes']:.3g}", *seconds, *shares, f"{BATCH / x['cpu_s']:.3g}"))
    lines = [
        "rewards: ocr with one worker, and a service that takes 2 s for a batch",
        machine_line("threads: service 1", None) + ("" if None in (before, machine.load()) else f"; load {before:g} before"),
        "", aligned(rows), "",
        "Alone: processor time on the same files, of rapidocr with the scorer's settings and of the scorer, which compares (limit 1.05).",
        "Transport: share of a batch's time by the clock in which the worker, which opens files and scores, does nothing (limit 5%);",
        f"chunks of {', '.join(f'{chunk} images at {side} px' for side, chunk in SIDES.items())}.",
        "Of processor time: what the client and the service's own process take, for files, packing and HTTP, beside the worker.",
        f"Overlap: 12 chunks, each computed in 2 s and scored in 2 s: {duration(step)} for {duration(24.0)} of either, "
        f"{step / 24:.3f} times (limit 1.1).",
    ]  # fmt: skip
    data = {"sizes": sizes, "overlap_s": step, "machine": machine.describe()}
    return Report("\n".join(lines), {"benchmark": "rewards", "versions": machine.versions((*OURS, "rapidocr")), **data})


def transport(client: RewardClient, side: int, grain: float, repeats: int, seconds: float) -> dict[str, float]:
    """Medians of turns of all three, for one batch: processor seconds of rapidocr and of the scorer in this process, seconds by the
    clock through the service.

    Alone, the scorer opens files that lie ready and scores them. Through the service there is all else beside it: files are made of
    arrays, packed, sent, received, checked, handed to the worker, and the answers come back. `transport` is the share of the time in which
    the worker does not compute; the scorer in this process is no measure of it, as another process may be a tenth faster or slower.
    `beside` is the share of the processor time that all processes but the worker take, which other programs on the machine change little.

    Args:
      grain: standard deviation of noise on the images, of which files become as large as those of photographs.
    """
    scorer, noise = build_scorer("ocr"), np.random.default_rng(side)
    images = [sign(f"HELLO{n}", side, side, px=side / 8) for n in range(BATCH)]
    images = [np.clip(image + noise.normal(0, grain, image.shape), 0, 255).astype(np.uint8) for image in images]
    items = [ocr_item(f"HELLO{n}") for n in range(BATCH)]
    files = [protocol.encode_image(image) for image in images]
    turns, end = [], time.perf_counter() + seconds
    while len(turns) < 3 or len(turns) <= repeats and time.perf_counter() < end:  # the first is a warm-up
        first = time.process_time()
        for file in files:
            scorer.reader._engine(file, use_det=True, use_cls=False, use_rec=True)
        began = time.process_time()
        for n in range(0, BATCH, client.config.chunk):
            score_files(scorer, files[n : n + client.config.chunk], items[n : n + client.config.chunk], protocol.Limits())
        between, before, start = time.process_time(), machine.family(), time.perf_counter()
        client.score(images, items)
        wall, after = time.perf_counter() - start, machine.family()
        busy = [after[pid] - seconds for pid, seconds in before.items()]
        turns.append((began - first, between - began, wall, max(busy), sum(busy)))
    engine, alone, wall, _, cpu = map(median, zip(*turns[1:]))
    # Sums, as processor time is counted in hundredths of a second.
    whole, worker, all_of_them = (sum(turn[n] for turn in turns[1:]) for n in (2, 3, 4))
    sizes = {"side": side, "grain": grain, "kilobytes": sum(map(len, files)) / BATCH / 1e3}
    times = {"engine_s": engine, "alone_s": alone, "wall_s": wall, "cpu_s": cpu}
    return sizes | times | {"turns": len(turns) - 1, "transport": 1 - worker / whole, "beside": 1 - worker / all_of_them}


def overlap(seconds: float, chunks: int) -> float:
    """Seconds of a step whose chunks take `seconds` to be computed, and as long to be scored in the background."""
    image = protocol.encode_image(np.zeros((32, 32, 3), np.uint8))
    with inline_service(workers=InlineWorkers(seconds=seconds)) as up, RewardClient("ocr", up.url) as client:
        client.connect()
        began, waiting = time.perf_counter(), []
        for _ in range(chunks):
            time.sleep(seconds)
            waiting.append(client.score_async([image] * 8, [ocr_item("A")] * 8))
        scores = [score for future in waiting for score in client.wait(future)]
        took = time.perf_counter() - began
    assert not any(score.failed for score in scores)
    return took


def faults(config: grpo.GRPORun, count: int, down: float, max_steps: int = 100) -> Report:
    """A GRPO run whose reward requests meet `count` faults and one outage of `down` seconds, against the same run without them."""
    mesh = make_mesh(config.mesh.sizes())
    with inline_service(max_connections=1000) as up, fault_proxy(up.url, 0.6, slow=6.0) as proxy, jax.set_mesh(mesh):
        broken, state = trained(config, proxy.url, mesh), up.service.state
        for step in range(1, max_steps + 1):
            if step == 2:
                proxy.down = True
                threading.Timer(down, setattr, (proxy, "down", False)).start()
            broken.step()
            if masked := broken.metrics["reward/masked_frac"]:
                raise ValueError(f"step {step}: {masked:.1%} of the rollouts were not scored")
            if proxy.met.total() >= count:
                break
        images, scored, repeated = step * config.batch_size * config.grpo.rollouts_per_prompt, state.scored, state.repeated
        broken.stage.close()
        whole = trained(config, up.url, mesh)
        for _ in range(step):
            whole.step()
        whole.stage.close()
    same = all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(t.state.params) for t in (broken, whole))))
    lines = [
        f"rewards --faults: {step} GRPO steps with {proxy.met.total()} injected faults and an outage of {down:g} s",
        ", ".join(f"{name} {n}" for name, n in sorted(proxy.met.items())),
        f"{images} images, scored {scored} times; {repeated} requests were repeated and answered from memory; none was lost",
        f"final parameters {'equal' if same else 'DIFFER FROM'} those of the run without faults",
    ]
    data: dict[str, Any] = {"steps": step, "faults": dict(proxy.met), "images": images, "scored": scored, "equal": same}
    return Report("\n".join(lines), {"benchmark": "rewards-faults", **data})


def trained(config: grpo.GRPORun, url: str, mesh: jax.sharding.Mesh) -> Trainer:
    """A trainer with one reward, at an address, from the start."""
    rewards = {name: dataclasses.replace(reward, weight=None) for name, reward in config.rewards.items()}
    rewards["ocr"] = RewardConfig((url,), weight=1.0, **PATIENT)
    return Trainer(dataclasses.replace(config, rewards=rewards), mesh)
