"""The server: a real OCR service end to end, and its limits, queue and start-up errors."""

import asyncio
import os
import signal
import socket
import subprocess
import time

import httpx
import numpy as np
import pytest

from tests.rewards.images import ocr_item, sign
from tests.rewards.running import children, command, is_alive, service
from xomni_jax.rewards import Score, Scorer, protocol, server
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import JSON, MSGPACK, Limits, Request
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.server import ServiceConfig, create_app
from xomni_jax.rewards.workers import Workers, score_files

WORDS = ["HELLO", "OPEN", "CAFE", "EXIT", "GARDEN", "A"]


@pytest.fixture(scope="module")
def ocr():
    with service("ocr") as running:
        yield running


def test_real_service_reads_words(ocr):
    """Words at 8 pixels a letter are read exactly; a wrong word, no text, no target and a broken file are told apart."""
    with RewardClient("ocr", ocr[1], chunk=4) as client:
        assert client.health()[0].workers == 2
        images = [sign(w) for w in WORDS] + [
            sign("OPEN 24 HOURS", 32, 128),
            sign("OPEN\nLATE", 40, 64),
            sign("Bakery", 96, 160, px=32),
        ]
        items = [ocr_item(w) for w in WORDS] + [ocr_item("OPEN 24 HOURS"), ocr_item("OPEN", "LATE"), ocr_item("Bakery")]
        scores = client.score(images, items)
        assert [s.value for s in scores] == [1.0] * len(images), scores
        assert all(s.detail["exact"] for s in scores) and scores[6].detail["text"] == "OPEN 24 HOURS"

        wrong, empty, absent, broken = client.score(
            [sign("OPEN"), np.full((32, 64, 3), 90, np.uint8), sign("OPEN"), b"no image"],
            [ocr_item("OVEN"), ocr_item("OPEN"), {"prompt": "x", "targets": {"background": "red"}}, ocr_item("OPEN")],
        )
        assert wrong.value == 0.75 and not wrong.detail["exact"] and wrong.detail["text"] == "OPEN"
        assert empty.value == 0 and empty.detail == {"text": "", "exact": False, "no_text": True}
        assert not absent.applies and broken.value is None and "cannot be read" in broken.error
        health = client.health()[0]
        assert (health.failed, health.not_applicable, health.scored, health.queue) == (1, 1, len(images) + 2, 0)


def test_json_says_the_same_as_msgpack(ocr):
    body = protocol.encode(Request(schema=1, id="a", images=[protocol.encode_image(sign("EXIT"))], items=[ocr_item("EXIT")]), JSON)
    answer = httpx.post(ocr[1] + "/score", content=body, headers={"Content-Type": JSON}, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["scores"] == [1.0] and answer.json()["scorer"] == "ocr" and answer.json()["schema"] == 1


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"\xc1", 400, "not a valid request of schema 1 in application/msgpack"),
        (protocol.encode(Request(schema=1, id="a", images=[b"x"], items=[])), 400, "1 images but 0 items"),
        (
            protocol.encode(Request(schema=1, id="a", images=[b"x"] * 257, items=[ocr_item("A")] * 257)),
            413,
            "has 257, over the limit of 256 images",
        ),
    ],
)
def test_bad_requests_get_one_sentence(ocr, body, status, words):
    answer = httpx.post(ocr[1] + "/score", content=body, headers={"Content-Type": MSGPACK}, trust_env=False)
    assert answer.status_code == status and words in answer.json()["error"]


def test_port_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(command("ocr", "--port", port), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert f"port {port} on 127.0.0.1 cannot be used" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_missing_package_ends_with_one_sentence(tmp_path):
    (tmp_path / "rapidocr.py").write_text("raise ImportError('absent', name='rapidocr')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command("ocr", "--port", "0", "--workers", "1"), capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2
    assert done.stderr.strip() == "xomni serve-reward: scorer 'ocr' needs the package 'rapidocr': pip install 'xomni_jax[rewards]'"


def test_sigterm_ends_cleanly_and_takes_the_workers_along(ocr):
    """Last use of the shared service: exit code 0, nothing on stderr, no process left."""
    process, url = ocr
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""
    _gone(workers)
    with pytest.raises(httpx.HTTPError):
        httpx.get(url + "/health", trust_env=False)


def test_workers_follow_a_killed_parent():
    with service("shapes", "--workers", "1") as (process, _):
        workers = children(process.pid)
        assert workers
        process.kill()
        _gone(workers)


def _gone(pids, seconds=10):
    end = time.monotonic() + seconds
    while any(is_alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(is_alive(p) for p in pids)


class HeldWorkers:
    """Stands in for the processes: scores nothing until released."""

    def __init__(self):
        self.version, self.release = "held", asyncio.Event()

    async def start(self):
        pass

    def close(self):
        pass

    async def score(self, images, items):
        await self.release.wait()
        return [Score(1.0) for _ in images]


def test_queue_is_bounded_and_health_answers_meanwhile(monkeypatch):
    """Of two requests that fit only one at a time the second gets 429 with Retry-After; /health answers while the first waits."""
    made = []
    monkeypatch.setattr(server, "Workers", lambda *_: made.append(HeldWorkers()) or made[0])
    app = create_app(ServiceConfig("ocr", workers=1, max_queue=5, limits=Limits(max_images=4, max_body_bytes=10_000)))
    body = protocol.encode(Request(schema=1, id="a", images=[b"x"] * 3, items=[ocr_item("A")] * 3))

    async def talk():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def post(content=body):
                return client.post("/score", content=content, headers={"Content-Type": MSGPACK})

            first = asyncio.create_task(post())
            await asyncio.sleep(0.05)
            second, large, health = await post(), await post(b"x" * 20_000), await client.get("/health")
            made[0].release.set()
            return await first, second, large, health, await client.get("/health")

    first, second, large, health, later = asyncio.run(talk())
    assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1 and "3 images wait" in second.json()["error"]
    assert large.status_code == 413
    assert health.json()["queue"] == 3 and health.json()["rejected"] == 2 and health.json()["version"] == "held"
    assert first.status_code == 200 and later.json()["queue"] == 0 and later.json()["scored"] == 3


def test_worker_that_dies_is_replaced():
    async def run():
        workers = Workers("shapes", {}, 1, Limits())
        try:
            await workers.start()
            item = {"prompt": "", "targets": {"background": "red"}}
            image = protocol.encode_image(sign("A"))
            before = await workers.score([image], [item])
            for pid in list(workers._pools[0]._processes):
                os.kill(pid, signal.SIGKILL)
            died = await workers.score([image] * 2, [item] * 2)
            return before, died, await workers.score([image], [item])
        finally:
            workers.close()

    before, died, after = asyncio.run(run())
    assert before[0].value > 0.9 and after == before
    assert all(s.value is None and "worker process died" in s.error for s in died)


class Stubborn(Scorer):
    """Fails in another way for each item."""

    name = "stubborn"

    def score_image(self, image, item):
        match item["do"]:
            case "raise":
                raise RuntimeError("no model")
            case "nan":
                return Score(float("nan"))
            case "skip":
                return Score(None)
            case "text":
                return Score("0.5")
            case "number":
                return 0.5
            case "object":
                return Score(0.5, detail={"scorer": self})
        return Score(0.5, detail={"shape": list(image.shape)})


class Batched(Scorer):
    """Works on whole batches, and forgets an image when it is told to."""

    name = "batched"

    def score(self, images, items):
        return [Score(len(images)) for item in items if item["do"] != "forget"]


def test_each_image_fails_alone():
    image = protocol.encode_image(sign("A", 16, 24))
    todo = [{"do": do} for do in ("raise", "nan", "skip", "text", "score", "number", "object", "unread")]
    scores = score_files(Stubborn(), [image] * 7 + [b"no image"], todo, Limits())
    assert scores[0] == Score(None, "stubborn failed: RuntimeError: no model")
    assert scores[1].value is None and "not finite" in scores[1].error
    assert scores[2] == Score(None) and not scores[2].applies
    assert scores[3].value is None and "stubborn failed: TypeError" in scores[3].error
    assert scores[4] == Score(0.5, None, {"shape": [16, 24, 3]})
    assert "one Score per image, 1 in all, not [0.5]" in scores[5].error
    assert "the detail holds a Stubborn, which has no form in JSON" in scores[6].error
    assert "cannot be read" in scores[7].error
    assert "the limit is 10" in score_files(Stubborn(), [image], [{"do": "score"}], Limits(max_pixels=10))[0].error


def test_a_batch_of_the_wrong_length_is_scored_image_by_image():
    image = protocol.encode_image(sign("A", 16, 24))
    score = lambda *todo: score_files(Batched(), [image] * len(todo), [{"do": do} for do in todo], Limits())  # noqa: E731
    assert [s.value for s in score("", "", "")] == [3, 3, 3]
    first, second, third = score("", "forget", "")
    assert first.value == third.value == 1 and "it must return one Score per image, 1 in all, not []" in second.error


def test_a_service_has_workers():
    with pytest.raises(ServiceError, match="at least 1"):
        ServiceConfig("ocr", workers=0)
