"""Scores through a proxy that breaks most requests: all arrive, each image is scored once, and none is guessed."""

import threading
import time

from tests.benchmarks import bodies
from tests.benchmarks.faults import FAULTS, fault_proxy, inline_service, pixel_score
from tests.rewards.images import ocr_item
from xomni_jax.rewards.client import RewardClient

PATIENT = {"backoff": 0.002, "timeout": 0.4, "max_wait": 60.0, "attempts": 50, "say": lambda line: None}


def test_every_fault_is_survived_and_nothing_is_scored_twice():
    images = [n.to_bytes(4, "big") for n in range(96)]
    with inline_service() as up, fault_proxy(up.url, 0.6, slow=0.6) as a, fault_proxy(up.url, 0.6, slow=0.6, seed=1) as b:
        with RewardClient("ocr", [a.url, b.url], chunk=1, concurrency=8, **PATIENT) as client:
            scores = client.score(images, [ocr_item("A")] * len(images))
        met = a.met + b.met
    assert [s.value for s in scores] == [pixel_score(image) for image in images]
    assert set(met) == set(FAULTS) and sum(met.values()) > 50
    assert up.workers.scored.most_common(1)[0][1] == 1 and up.service.state.repeated > 0


def test_all_replicas_down_for_a_while():
    """The service is gone in the middle of a call, and comes back."""
    images = [n.to_bytes(4, "big") for n in range(40)]
    with inline_service() as up, fault_proxy(up.url, 0.0) as proxy:
        with RewardClient("ocr", proxy.url, chunk=1, **PATIENT | {"attempts": 2}) as client:
            client.score(images[:1], [ocr_item("A")])
            proxy.down = True
            future = client.score_async(images, [ocr_item("A")] * len(images))
            time.sleep(0.5)
            assert not future.done()
            threading.Timer(0.2, setattr, (proxy, "down", False)).start()
            assert [s.value for s in future.result(timeout=30)] == [pixel_score(image) for image in images]


def test_damaged_requests_cost_nothing():
    """Bodies over HTTP: a ValueError is an answer other than 2xx or 4xx. `xomni bench rewards --bodies 10000` sends more."""
    found = bodies.run(300).data
    assert {200, 400} <= set(found["statuses"]) and found["status"] == "ok"
    (memory, most), (descriptors, most_descriptors) = found["memory_mb"], found["descriptors"]
    assert most < memory + 32 and most_descriptors <= descriptors + 8
