"""The server: a real OCR service end to end, and its limits, queue and start-up errors."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import httpx
import jsonschema
import msgspec
import numpy as np
import pytest

from tests.rewards.images import ocr_item, sign
from tests.rewards.running import children, command, is_alive, service
from xomni_jax.core.http import Refusal
from xomni_jax.rewards import Score, Scorer, protocol, server
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import JSON, MSGPACK, Limits, Request
from xomni_jax.rewards.replicas import RewardServiceError
from xomni_jax.rewards.scorer import Unavailable
from xomni_jax.rewards.server import ServiceConfig, create_app
from xomni_jax.rewards.workers import Workers, read_state, score_files, write_state

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
        (b"\xc1", 400, "not a valid request of schema 2 in application/msgpack"),
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
    """Last use of the shared service: what is under way is answered, exit code 0, nothing on stderr, no process left."""
    process, url = ocr
    workers = children(process.pid)
    with RewardClient("ocr", url) as client:
        answers = client.score_async([sign("HELLO", 200, 400, px=60)] * 24, [ocr_item("HELLO")] * 24)
        while not client.health()[0].queue:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert [s.value for s in answers.result(timeout=60)] == [1.0] * 24
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""
    _gone(workers)
    with pytest.raises(httpx.HTTPError):
        httpx.get(url + "/health", trust_env=False)


def test_tls_and_token(tmp_path, monkeypatch):
    """A client that trusts the certificate and has the token is served; others say what is missing."""
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1".split()
    subprocess.run(["openssl", *made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    monkeypatch.setenv(server.TOKEN, "secret")
    item = {"prompt": "", "targets": {"background": "red"}}
    with service("shapes", "--workers", "1", "--tls-cert", cert, "--tls-key", key) as (_, url):
        assert url.startswith("https://")
        with RewardClient("shapes", url, ca=cert) as client:
            assert client.connect().scorer == "shapes" and client.score([sign("A")], [item])[0].value > 0.9
        with RewardClient("shapes", url) as client, pytest.raises(RewardServiceError, match="no reward service answers"):
            client.connect()
        monkeypatch.setenv(server.TOKEN, "wrong")
        with RewardClient("shapes", url, ca=cert) as client:
            (score,) = client.score([sign("A")], [item])
            assert score.kind == "refused" and "token is missing or wrong" in score.error


def _gone(pids, seconds=10):
    end = time.monotonic() + seconds
    while any(is_alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(is_alive(p) for p in pids)


class HeldWorkers:
    """Stands in for the processes: scores nothing until released."""

    def __init__(self):
        self.version, self.model_hash, self.release, self.calls = "held", "", asyncio.Event(), 0
        self.images, self.seconds_busy = 10, 40.0

    def slowest(self):
        return 0.0

    async def start(self):
        pass

    def close(self):
        pass

    async def score(self, images, items, progress, state):
        self.calls += 1
        await self.release.wait()
        return [Score(1.0) for _ in images], b""


def talk(monkeypatch, conversation, **config):
    """What `conversation(client, post, workers)` returns, with a service whose workers are held."""
    workers = HeldWorkers()
    monkeypatch.setattr(server, "Workers", lambda *_: workers)
    app = create_app(ServiceConfig("ocr", workers=2, **config))

    async def run():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await asyncio.sleep(0.02)

            def post(id="a", content=None, **headers):
                message = Request(schema=2, id=id, images=[b"x"] * 3, items=[ocr_item("A")] * 3, keys=["0", "1", "2"])
                return client.post("/score", content=content or protocol.encode(message), headers={"Content-Type": MSGPACK, **headers})

            return await conversation(client, post, workers)

    return asyncio.run(run())


def test_queue_is_bounded_and_health_answers_meanwhile(monkeypatch):
    """Of two requests that fit only one at a time the second gets 429 with Retry-After; /health answers while the first waits."""

    async def conversation(client, post, workers):
        first = asyncio.create_task(post())
        await asyncio.sleep(0.05)
        second, large, health = await post("b"), await post("c", b"x" * 20_000), await client.get("/health")
        workers.release.set()
        return await first, second, large, health, await client.get("/health")

    limits = Limits(max_images=4, max_body_bytes=10_000)
    first, second, large, health, later = talk(monkeypatch, conversation, max_queue=5, limits=limits)
    assert second.status_code == 429 and "3 images wait" in second.json()["error"]
    assert int(second.headers["retry-after"]) == 6  # 3 images of 4 s each, by two workers
    assert large.status_code == 413
    assert health.json()["queue"] == 3 and health.json()["rejected"] == 2 and health.json()["version"] == "held"
    assert first.status_code == 200 and later.json()["queue"] == 0 and later.json()["scored"] == 3


def test_a_scorer_whose_model_is_away_is_busy(monkeypatch):
    """503 with Retry-After, which clients wait out; the same request is then scored, since it has not been."""

    async def conversation(client, post, workers):
        async def away(*_):
            raise Unavailable("no reply of the model")

        with monkeypatch.context() as patch:
            patch.setattr(workers, "score", away)
            refused = await post()
        workers.release.set()
        return refused, await post()

    refused, scored = talk(monkeypatch, conversation)
    assert (refused.status_code, refused.json()) == (503, {"error": "no reply of the model"}) and refused.headers["retry-after"] == "2"
    assert scored.status_code == 200


def test_a_repeated_request_is_scored_once(monkeypatch):
    """While it is being scored, and afterwards; another body under the same id is another request."""

    async def conversation(client, post, workers):
        both = [asyncio.create_task(post()) for _ in range(2)]
        await asyncio.sleep(0.05)
        workers.release.set()
        answers = [await task for task in both] + [await post()]
        assert workers.calls == 1
        other = Request(schema=2, id="a", images=[b"y"], items=[ocr_item("A")], keys=["0"])
        await post(content=protocol.encode(other))
        return answers, workers.calls, (await client.get("/health")).json()

    answers, calls, health = talk(monkeypatch, conversation)
    assert len({answer.content for answer in answers}) == 1 and calls == 2
    assert (health["requests"], health["repeated"], health["scored"]) == (2, 2, 4)


def test_only_so_many_answers_are_kept(monkeypatch):
    monkeypatch.setattr("xomni_jax.rewards.server._KEPT", 64)

    async def conversation(client, post, workers):
        workers.release.set()
        for n in range(70):
            await post(str(n))
        await post("69")
        before = workers.calls
        await post("0")
        return before, workers.calls

    assert talk(monkeypatch, conversation) == (70, 71)


def test_a_request_whose_client_has_gone_is_given_up(monkeypatch):
    """Unless somebody asks again in time."""

    async def conversation(client, post, workers):
        service = client._transport.app.state.service
        message = Request(schema=2, id="a", images=[b"x"], items=[ocr_item("A")], keys=["0"])

        class Gone:
            async def receive(self):
                return {"type": "http.disconnect"}

        for digest, again in ((b"1", False), (b"2", True)):
            with pytest.raises(Refusal):
                await service.result(Gone(), message, digest)
            second = asyncio.create_task(service.result(SimpleNamespace(receive=asyncio.Event().wait), message, digest)) if again else None
            await asyncio.sleep(0.15)
        workers.release.set()
        return service.state.abandoned, service.state.queue, await second

    abandoned, queue, scores = talk(monkeypatch, conversation, abandoned_seconds=0.05)
    assert (abandoned, scores) == (1, ([Score(1.0)], b"")) and queue == 1


def test_what_is_being_received_is_bounded(monkeypatch):
    """Of all requests together: each alone is within the limits."""

    async def conversation(client, post, workers):
        workers.release.set()
        return await post(), await post("b", b"x" * 2_000), client._transport.app.state.service.bodies.held

    fine, refused, left = talk(monkeypatch, conversation, max_buffered=1_000)
    assert fine.status_code == 200 and left == 0
    assert refused.status_code == 429 and "are being received" in refused.json()["error"] and refused.headers["retry-after"] == "1"


def test_a_token_is_asked_for(monkeypatch):
    monkeypatch.setenv(server.TOKEN, "secret")

    async def conversation(client, post, workers):
        workers.release.set()
        answers = [await post(**({"Authorization": given} if given else {})) for given in ("", "Bearer no", "secret", "Bearer secret")]
        return [answer.status_code for answer in answers], answers[0].json()["error"], (await client.get("/health")).json()["token"]

    codes, error, told = talk(monkeypatch, conversation)
    assert codes == [401, 401, 401, 200] and server.TOKEN in error and told


def test_what_a_service_tells_about_itself(monkeypatch):
    async def conversation(client, post, workers):
        workers.release.set()
        await post()
        ready = await client.get("/ready")
        return ready, (await client.get("/info")).json(), (await client.get("/metrics")).text, (await client.get("/openapi.json")).json()

    ready, info, metrics, api = talk(monkeypatch, conversation)
    assert ready.status_code == 200 and ready.json() == {"status": "ok"}
    assert (info["scorer"], info["schema"], info["version"], info["scope"]) == ("ocr", 2, "held", "image")
    assert 'xomni_reward_scored_total{scorer="ocr"} 3\n' in metrics and "# TYPE xomni_reward_queue gauge" in metrics
    assert {"/score", "/health", "/ready", "/info", "/metrics"} == set(api["paths"])
    jsonschema.Draft202012Validator.check_schema(api["components"]["schemas"]["Request"])
    validator = jsonschema.Draft202012Validator(api["components"]["schemas"]["Request"] | {"components": api["components"]})
    message = {"schema": 2, "id": "a", "images": ["aaaa"], "items": [{"prompt": "", "targets": {}}], "keys": ["0"]}
    validator.validate(message)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(message | {"images": [3]})


def test_a_service_that_loads_is_alive_and_not_ready(monkeypatch):
    start, HeldWorkers.start = HeldWorkers.start, lambda self: asyncio.sleep(60)
    try:

        async def conversation(client, post, workers):
            return [(await client.get(path)).status_code for path in ("/health", "/ready")], await post()

        (alive, ready), score = talk(monkeypatch, conversation)
    finally:
        HeldWorkers.start = start
    assert (alive, ready, score.status_code) == (200, 503, 503) and score.headers["retry-after"] == "5"


def test_a_hanging_worker_shows_in_the_health(monkeypatch):
    async def conversation(client, post, workers):
        workers.slowest = lambda: 20.0
        return [await client.get(path) for path in ("/health", "/ready")]

    health, ready = talk(monkeypatch, conversation, slice_seconds=10.0)
    assert health.status_code == ready.status_code == 503 and health.json()["status"] == "stuck"


def test_slow_clients_are_cut_off_and_workers_follow_a_killed_parent():
    """A connection that sends nothing, a head that is never complete, and a body that stops are ended; the service goes on."""
    with service("shapes", "--workers", "1", "--header-seconds", "0.5", "--body-seconds", "0.5") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        for sent in (b"", b"POST /score HTTP/1.1\r\nHost: a\r\n", b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nabc"):
            with socket.create_connection((host, int(port)), timeout=10) as stalled:
                stalled.sendall(sent)
                answer = stalled.recv(1000)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=10) as kept:
            for _ in range(2):  # a connection that is used stays
                kept.sendall(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += kept.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200")
                time.sleep(0.8)
        workers = children(process.pid)
        assert workers
        process.kill()
        _gone(workers)


def test_worker_that_dies_is_replaced():
    """Its images are scored by another one."""

    async def run():
        workers = Workers("shapes", {}, 1, Limits())
        try:
            await workers.start()
            item = {"prompt": "", "targets": {"background": "red"}}
            image = protocol.encode_image(sign("A"))
            before, _ = await workers.score([image], [item])
            for pid in list(workers._pools[0]._processes):
                os.kill(pid, signal.SIGKILL)
            return before, (await workers.score([image] * 2, [item] * 2))[0]
        finally:
            workers.close()

    before, after = asyncio.run(run())
    assert before[0].value > 0.9 and after == before * 2


KILLER = """
import os, time
from xomni_jax.rewards import Score, Scorer

class Killer(Scorer):
    name = "killer"

    def score_image(self, image, item):
        if item["prompt"] == "die":
            os._exit(1)
        if item["prompt"] == "hang":
            time.sleep(60)
        return Score(1.0)
"""


def test_an_image_that_kills_or_holds_its_worker_fails_alone(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    image = protocol.encode_image(sign("A"))
    prompts = ["", "die", "", "hang", ""]

    async def run():
        workers = Workers(f"{tmp_path}/killer.py:Killer", {}, 2, Limits(), seconds=1.5)
        try:
            await workers.start()
            scores, _ = await workers.score([image] * 5, [{"prompt": p, "targets": {}} for p in prompts])
            return scores, workers.slowest()
        finally:
            workers.close()

    scores, slowest = asyncio.run(run())
    assert [s.value for s in scores] == [1.0, None, 1.0, None, 1.0] and slowest == 0.0
    assert "worker process died" in scores[1].error and "took more than 1.5 s" in scores[3].error


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


class Pairs(Scorer):
    """Compares the images of a group."""

    name, scope, range = "pairs", "group", (0.0, 1.0)

    def score(self, images, items):
        if any(item["do"] == "raise" for item in items):
            raise RuntimeError("no")
        return [Score(2.0 if item["do"] == "far" else len(images) / 10) for item in items]


def test_a_group_is_judged_in_one_call_and_fails_as_a_whole():
    image = protocol.encode_image(sign("A", 16, 24))
    items = [{"do": do, "group": group} for group, dos in (("a", ["", ""]), ("b", ["", "raise"]), ("c", ["far"])) for do in dos]
    scores = score_files(Pairs(), [image] * 5, items, Limits())
    assert [s.value for s in scores] == [0.2, 0.2, None, None, None]
    assert "pairs failed: RuntimeError: no" in scores[2].error and "2, outside of its range 0 to 1" in scores[4].error


def test_slices_keep_groups_whole():
    items = [{"group": g} for g in "aabbbc"]
    cut = lambda size, scope: [list(range(6))[s] for s in protocol.slices(items, size, scope)]  # noqa: E731
    assert cut(4, "image") == [[0, 1, 2, 3], [4, 5]] and cut(4, "set") == [[0, 1, 2, 3, 4, 5]]
    assert cut(1, "group") == [[0, 1], [2, 3, 4], [5]] and cut(5, "group") == [[0, 1, 2, 3, 4], [5]]
    assert protocol.slices([], 4, "group") == [] and len(protocol.slices([{}] * 3, 1, "group")) == 3


MEAN = """
import numpy as np
from xomni_jax.rewards import Score, Scorer

class Mean(Scorer):
    name, scope = "mean", "set"
    seen = 0

    def score(self, images, items):
        self.seen += len(images)
        return [Score(self.seen) for _ in images]

    def state(self):
        return {"seen": np.array(self.seen)}

    def restore(self, state):
        self.seen = int(state["seen"])
"""


def test_a_scorer_of_whole_sets_is_told_what_it_remembers(tmp_path):
    """One process gets all images of a request in one call. A step that is repeated, after a kill or by another service, is answered
    equally; a request that tells nothing starts anew."""
    (tmp_path / "mean.py").write_text(MEAN)
    images, items = [sign("A", 8, 8)] * 20, [{"prompt": "", "targets": {}}] * 20
    steps = []
    for _ in range(2):
        with service(f"{tmp_path}/mean.py:Mean", "--workers", "3") as (_, url), RewardClient("mean", url) as client:
            for n, state in ((20, b""), (2, steps[0][1] if steps else None), (20, b"")):
                client.state = client.state_after if state is None else state
                steps.append((client.score(images[:n], items[:n])[0].value, client.state_after))
            assert client.health()[0].limits.max_images > 2_000
            client.state = b"nonsense"
            (score,) = client.score(images[:1], items[:1])
            assert "the state of the request is none of mean" in score.error and client.state_after == b"nonsense"
    assert [value for value, _ in steps] == [20, 22, 20] * 2 and steps[:3] == steps[3:]


def test_a_state_is_read_or_refused():
    arrays = {"mean": np.arange(3.0), "calls": np.array(4), "square": np.eye(2, dtype=np.float32).T}
    for name, array in read_state(write_state(arrays)).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    assert write_state({}) == b""
    pack = msgspec.msgpack.encode
    for data in (b"x", b"", pack({"a": ("O", (1,), bytes(8))}), pack({"a": ("<f8", (2,), bytes(8))}), pack({"a": ("f(", (1,), b"")})):
        with pytest.raises((msgspec.DecodeError, TypeError, ValueError)):
            read_state(data)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ServiceConfig("ocr", workers=0)
