"""Other people's protocols, on both sides; nothing in a pickle is ever called. A server in plain Python."""

import base64
import json
import os
import pickle
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.benchmarks.faults import InlineWorkers, inline_service
from tests.miniature import ROOT
from tests.rewards import plain_service
from tests.rewards.images import sign
from xomni_jax.rewards import Score, protocol, wires
from xomni_jax.rewards.check import check
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import Limits, ProtocolError, Request

FAST = {"backoff": 0.01, "timeout": 5.0, "max_wait": 10.0, "attempts": 2}
ITEM = {"prompt": "a sign", "targets": {"tag": "counting", "include": [{"class": "bus", "count": 2}]}}


class Answers(InlineWorkers):
    """Scores as told, one for each image of the only request."""

    def __init__(self, *scores):
        super().__init__()
        self.scores, self.asked = scores, None

    async def score(self, images, items, progress, state):
        self.asked = images, items
        return list(self.scores), b""


@pytest.mark.parametrize("name", ["flow_grpo", "unirl"])
def test_our_client_and_our_service_speak_it(name):
    workers = Answers(Score(0.25), Score(0.75))
    with inline_service(workers=workers, protocol=name) as up, RewardClient("ocr", up.url, protocol=name, **FAST) as client:
        assert client.connect().scorer == "ocr"
        assert [s.value for s in client.score([sign("A"), sign("B")], [ITEM, ITEM])] == [0.25, 0.75]
    images, items = workers.asked
    assert items == [ITEM, ITEM] and protocol.decode_image(images[0]).shape == sign("A").shape
    assert images[0][:2] == (b"\xff\xd8" if name == "flow_grpo" else b"\x89P")


def test_a_failure_is_never_a_number():
    """UniRL names it; the pickles have no word for it, so the request fails."""
    scores = Score(0.5), Score(None, "no text"), Score(None)
    with inline_service(workers=Answers(*scores), protocol="unirl") as up, RewardClient("ocr", up.url, protocol="unirl", **FAST) as client:
        told = client.score([sign("A")] * 3, [ITEM] * 3)
    assert [s.value for s in told] == [0.5, None, None] and [s.error for s in told[1:]] == ["no text", "the scorer does not apply"]
    with inline_service(workers=Answers(Score(None, "no text")), protocol="flow_grpo") as up:
        body = pickle.dumps({"images": [protocol.encode_image(sign("A"))], "prompts": ["a"]})
        answer = httpx.post(up.url + "/", content=body, trust_env=False)
    assert answer.status_code == 500 and "no text" in answer.text


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_pickles_of_plain_values_are_read(version):
    value = {"images": ["x"], "n": [1, -5, 300, 1 << 40], "f": 0.5, "t": (True, None), "d": {"a": [{}]}}
    assert wires.read_pickle(pickle.dumps(value, protocol=version)) == value
    if version > 2:
        assert wires.read_pickle(pickle.dumps(b"x" * 100_000, protocol=version)) == b"x" * 100_000


def test_numbers_of_numpy_are_read():
    for kind in (np.float16, np.float32, np.float64):
        assert wires.read_pickle(pickle.dumps({"scores": [kind(0.25)] * 3})) == {"scores": [0.25] * 3}
    for other in (np.int64(3), np.zeros(3), np.dtype(">f8").type(1).astype(">f8")):
        with pytest.raises(ProtocolError):
            wires.read_pickle(pickle.dumps({"scores": [np.array(other)]}))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/owned_by_a_pickle",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"images": [Evil()]}, protocol=2),
        b"cos\nsystem\n(S'touch /tmp/owned_by_a_pickle'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # a bytearray of 2^60 bytes
        b"\x80\x04" + b"]" * 300_000 + b".",
        b"",
        b"\x80\x04.",
        pickle.dumps(list(range(3)))[:-3],
    ],
)
def test_other_pickles_are_refused(data):
    with pytest.raises(ProtocolError):
        wires.read_pickle(data)
    assert not Path("/tmp/owned_by_a_pickle").exists()


@pytest.mark.parametrize(
    "name, body, words",
    [
        ("flow_grpo", pickle.dumps([1]), "no dictionary"),
        ("flow_grpo", pickle.dumps({"images": [3], "prompts": ["a"]}), "does not hold images and their prompts"),
        ("flow_grpo", pickle.dumps({"images": [b"x"] * 3, "prompts": ["a", "b"]}), "3 images but 2 items"),
        ("flow_grpo", pickle.dumps({"images": [b"x"] * 300, "prompts": ["a"]}), "over the limit of 256 images"),
        ("unirl", b"[]", "Expected `object`"),
        ("unirl", json.dumps({"requests": [{"history": []}]}).encode(), "has no image in base64"),
        ("unirl", json.dumps({"requests": [{"history": [{"text": "a", "image_b64": "!"}]}]}).encode(), "has no image in base64"),
        ("unirl", json.dumps({"requests": [{"history": [{"text": "a", "video_path": "/etc/passwd"}]}] * 300}).encode(), "over the limit"),
    ],
)
def test_malformed_requests_are_refused_in_one_sentence(name, body, words):
    with pytest.raises(ProtocolError, match=words):
        wires.WIRES[name]().read_request(body, protocol.JSON, Limits())


REQUEST = Request(schema=2, id="a", images=[b"x", b"y"], items=[ITEM, ITEM], scorer="ocr")


@pytest.mark.parametrize(
    "name, answer, values",
    [
        ("flow_grpo", {"scores": [1, 0.5], "rewards": [3.0, 3.0]}, [1.0, 0.5]),
        ("flow_grpo", {"outputs": [np.float32(0.5), np.float64(0.25)]}, [0.5, 0.25]),
        ("unirl", {"results": [{"ocr": {"words": 0.5, "ocr": 0.75}}, {"ocr": {"words": 0.5}}], "errors": [{}, {}]}, [0.75, 0.5]),
        ("unirl", {"results": [{}, {"ocr": {"ocr": None}}], "errors": [{"ocr": "boom"}, {}]}, [None, None]),
    ],
)
def test_answers_of_their_services(name, answer, values):
    body = pickle.dumps(answer) if name == "flow_grpo" else json.dumps(answer).encode()
    scores, _ = wires.WIRES[name]().read_response(body, protocol.JSON, REQUEST, "ocr")
    assert [s.value for s in scores] == values and all(s.failed == (s.value is None) for s in scores)


@pytest.mark.parametrize(
    "name, answer",
    [
        ("flow_grpo", {"scores": [1.0]}),
        ("flow_grpo", {"scores": ["1", "2"]}),
        ("flow_grpo", {"scores": [True, False]}),
        ("flow_grpo", {"error": "CUDA out of memory"}),
        ("unirl", {"results": [{"ocr": {"ocr": 1.0}}], "errors": [{}]}),
        ("unirl", {"results": [{}, {}], "errors": [{}]}),
    ],
)
def test_nonsense_from_their_services_is_no_score(name, answer):
    body = pickle.dumps(answer) if name == "flow_grpo" else json.dumps(answer).encode()
    with pytest.raises(ProtocolError):
        wires.WIRES[name]().read_response(body, protocol.JSON, REQUEST, "ocr")


def test_the_request_that_their_services_get():
    image = protocol.encode_image(sign("A"))
    request = Request(schema=2, id="a", images=[image], items=[ITEM], scorer="ocr")
    body, _ = wires.FlowGRPO().write_request(request, None)
    told = pickle.loads(body)
    assert told["prompts"] == ["a sign"] and told["meta_datas"] == [ITEM["targets"]] and told["images"][0][:2] == b"\xff\xd8"
    body, kind = wires.UniRL().write_request(request, None)
    turn = {"text": "a sign", "image_b64": base64.b64encode(image).decode()}
    wanted = {"history": [turn], "required_rewards": ["ocr"], "metadata": ITEM["targets"]}
    assert json.loads(body) == {"requests": [wanted]} and kind == protocol.JSON


# ---- a service in plain Python ----
@pytest.fixture
def plain():
    running = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (plain_service.Service,), {"log_message": lambda *_: None}))
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_a_service_in_plain_python_works(plain):
    files = [protocol.encode_image(sign(text)) for text in ("A", "HELLO")]
    with RewardClient("kilobytes", plain, **FAST) as client:
        assert client.connect().version == "1"
        assert [s.value for s in client.score(files, [ITEM, ITEM])] == [len(file) / 1000 for file in files]


def test_the_readme_shows_it_and_it_is_short():
    text = Path(plain_service.__file__).read_text()
    assert f"```python\n{text}```" in (ROOT / "xomni_jax/rewards/README.md").read_text() and len(text.splitlines()) < 35
    assert issubclass(plain_service.Service, BaseHTTPRequestHandler)


# ---- xomni rewards check ----
def test_a_service_that_answers_nonsense_is_not_trusted(plain):
    """The plain one gives numbers to files that are no images."""
    name, findings = check([plain], **FAST)
    assert name == "kilobytes" and [f.what for f in findings if f.ok is False] == ["a file that is no image fails alone"]
    assert next(f for f in findings if f.what == "known outcomes").told == "none are built in for kilobytes"


def roughness(file):
    return float(np.abs(np.diff(protocol.decode_image(file).astype(int), axis=1)).mean())


@pytest.mark.parametrize(
    "of, failing",
    [
        (lambda image: 1 / (1 + roughness(image)), set()),
        (lambda image: 0.5, {"known outcomes"}),
        (lambda image: 1 - 1 / (1 + roughness(image)), {"known outcomes"}),
        (lambda image, n=iter(range(10_000)): next(n) / 10_000, {"the order does not matter", "one by one as in a batch"}),
    ],
    ids=["sound", "constant", "inverted", "random"],
)
def test_known_outcomes_and_repetition(of, failing):
    class Workers(InlineWorkers):
        async def score(self, images, items, progress, state):
            return [Score(None, "unreadable") if image == b"no image" else Score(of(image)) for image in images], b""

    with inline_service("quality", Workers()) as up:
        _, findings = check([up.url], **FAST)
    assert {f.what for f in findings if f.ok is False} >= failing and (failing or all(f.ok is not False for f in findings))


def test_replicas_that_differ_are_named():
    with inline_service("quality", InlineWorkers(lambda image: 0.1)) as a, inline_service("quality", InlineWorkers(lambda image: 0.2)) as b:
        _, findings = check([a.url, b.url], **FAST)
    told = [f.what for f in findings if f.ok is False]
    assert any(what.startswith("replica ") for what in told)


def damaged(body, rng):
    """A body after a few random changes."""
    body = bytearray(body)
    for _ in range(rng.randint(1, 8)):
        at, other = rng.randrange(len(body)), rng.randrange(len(body))
        match rng.randint(0, 3):
            case 0:
                body[at] = rng.randrange(256)
            case 1 if len(body) > 30:
                del body[at : at + rng.randint(1, 20)]
            case 2:
                body[at:at] = rng.randbytes(rng.randint(1, 10))
            case _:
                body[at : at + 8] = body[other : other + 8]
    return bytes(body)


@pytest.mark.parametrize("name, kind", [("xomni", protocol.MSGPACK), ("xomni", protocol.JSON), ("flow_grpo", ""), ("unirl", protocol.JSON)])
def test_damaged_bodies_are_refused_in_one_sentence(name, kind):
    image, rng = protocol.encode_image(sign("A")), random.Random(0)
    request = Request(schema=2, id="a", images=[image] * 3, items=[ITEM] * 3, keys=["0", "1", "2"], scorer="ocr")
    wire = wires.WIRES[name]()
    body = protocol.encode(request, kind) if name == "xomni" else wire.write_request(request, None)[0]
    for _ in range(2_500):
        try:
            wire.read_request(damaged(body, rng), kind, Limits())
        except ProtocolError as error:
            assert error.status in (400, 413) and len(str(error)) < 500 and "\n" not in str(error)
