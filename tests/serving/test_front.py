"""One address before several hosts, some of which are slow, full, different or die: small servers, and in one test a real service."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.serving.running import listening
from xomni_jax.serving import app as site
from xomni_jax.serving import front as front_module
from xomni_jax.serving.front import Front
from xomni_jax.serving.options import FrontOptions

IMAGES = "/v1/images/generations"


class Host:
    """A service of these models: {name: hash}. `how`: answers to the POSTs that come, the last one for all others."""

    def __init__(self, models, *how, port=0):
        self.models, self.how, self.bodies, self.headers, self.ready = models, list(how) or ["ok"], [], [], True
        self.hold = threading.Event()
        routes = [Route("/ready", self.get_ready), Route("/v1/models", self.get_models), Route(IMAGES, self.post, methods=["POST"])]
        routes.append(Route("/v1/xomni/images/{name}.png", self.get_image))
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.hold.set()
        self.thread.join(10)
        self.listener.close()

    async def get_ready(self, request):
        return JSONResponse({}, 200 if self.ready else 503)

    async def get_models(self, request):
        self.headers.append(request.headers)
        return JSONResponse({"data": [{"id": name, "xomni": {"hash": hash}} for name, hash in self.models.items()]})

    async def get_image(self, request):
        return JSONResponse({"of": self.url}, 200 if request.path_params["name"] == f"image-{self.port}" else 404)

    async def post(self, request):
        self.bodies.append(json.loads(await request.body()))
        self.headers.append(request.headers)
        how = self.how.pop(0) if len(self.how) > 1 else self.how[0]
        if how == "hold":
            while not self.hold.is_set():
                await asyncio.sleep(0.01)
        if isinstance(how, int):
            return JSONResponse({"error": {"message": f"status {how}"}}, how, {"Retry-After": "7"})
        if how in ("dies", "dies later"):
            return StreamingResponse(self.dying(how), media_type="text/event-stream")
        return JSONResponse({"data": [], "host": self.url})

    async def dying(self, how):
        if how == "dies later":
            yield "event: first\ndata: {}\n\n"
            await asyncio.sleep(0.1)
        raise ConnectionError


@contextlib.contextmanager
def fronted(*hosts, **options):
    """(front, URL)."""
    front = Front([host if isinstance(host, str) else host.url for host in hosts], FrontOptions(**options), True, None)
    with listening(front) as url:
        while any(not r.about and not r.failures for r in front.hosts.all):
            time.sleep(0.01)
        yield front, url


def post(url, path=IMAGES, headers=None, **body):
    return httpx.post(url + path, json={"prompt": "a"} | body, headers=headers, timeout=30, trust_env=False)


def test_requests_go_to_the_least_busy_host_that_has_the_model():
    with Host({"sft": "1"}, "hold") as a, Host({"sft": "1", "rl": "2"}) as b, fronted(a, b) as (front, url), ThreadPoolExecutor() as pool:
        with httpx.Client(trust_env=False) as client:
            assert [m["id"] for m in client.get(url + "/v1/models").json()["data"]] == ["sft", "rl"]
            assert client.get(url + "/ready").json() == {"status": "ok", "models": ["sft", "rl"], "token": False, "hosts": 2, "ready": 2}
        held = pool.submit(post, url, model="sft")
        while not a.bodies:
            time.sleep(0.01)
        assert {post(url, model=m).json()["host"] for m in ("sft", "sft", "rl")} == {b.url}
        a.hold.set()
        assert held.result().json()["host"] == a.url
        missing = post(url, model="large")
        assert missing.status_code == 404 and "there is no model 'large' here; use one of sft, rl" in missing.json()["error"]["message"]
        assert "xomni_front_requests_total" in (told := httpx.get(url + "/metrics", trust_env=False).text)
        assert f'xomni_front_host_ready{{host="{a.url}"}} 1' in told
        assert missing.headers["x-content-type-options"] == "nosniff"


def test_a_request_that_names_no_model_gets_the_first_of_the_first_host():
    with (
        Host({"sft": "1", "rl": "2"}, "hold") as a,
        Host({"rl": "2", "sft": "1"}) as b,
        fronted(a, b) as (_, url),
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(post, url)
        while not a.bodies:
            time.sleep(0.01)
        post(url)
        assert b.bodies == [{"prompt": "a", "model": "sft"}] == a.bodies
        a.hold.set()
        assert held.result().status_code == 200


@pytest.mark.parametrize("how", ["dies", 503, 429])
def test_another_host_answers_for_one_that_cannot(how):
    with Host({"sft": "1"}, how) as a, Host({"sft": "1"}) as b, fronted(a, b) as (front, url):
        assert [post(url).json()["host"] for _ in range(2)] == [b.url] * 2
        assert len(a.bodies) >= 1 and front.counts["retried"] >= 1
        while any(r.in_flight for r in front.hosts.all):  # a host is released after its answer has gone out
            time.sleep(0.01)


def test_the_last_refusal_is_passed_on_when_all_are_busy():
    with Host({"sft": "1"}, 429) as a, Host({"sft": "1"}, 429) as b, fronted(a, b) as (_, url):
        answer = post(url)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7") and len(a.bodies) == len(b.bodies) == 1


def test_a_request_that_ends_two_hosts_is_not_sent_to_a_third():
    with Host({"m": "1"}, "dies") as a, Host({"m": "1"}, "dies") as b, Host({"m": "1"}, "dies") as c, fronted(a, b, c) as (_, url):
        answer = post(url)
        assert answer.status_code == 502 and "two hosts ended before they answered" in answer.json()["error"]["message"]
        assert len(a.bodies) + len(b.bodies) + len(c.bodies) == 2


def test_an_answer_that_has_begun_is_not_begun_again():
    with Host({"sft": "1"}, "dies later") as a, Host({"sft": "1"}, "dies later") as b, fronted(a, b) as (_, url):
        events = post(url, stream=True).text
        assert events.startswith("event: first\n") and "event: error\n" in events and "the host ended in the midst" in events
        assert len(a.bodies) + len(b.bodies) == 1


def test_hosts_that_come_and_go(capsys, monkeypatch):
    monkeypatch.setattr(front_module, "_WATCH", 0.05)
    monkeypatch.setattr(front_module, "_WAIT", 0.2)
    with Host({"sft": "1"}) as a, fronted(a) as (front, url):
        a.ready = False
        while httpx.get(url + "/ready", trust_env=False).status_code == 200:
            time.sleep(0.02)
        refused = post(url)
        assert refused.status_code == 503 and "no host that has sft answers" in refused.json()["error"]["message"]
        assert httpx.get(url + "/health", trust_env=False).json()["status"] == "without a host"
        a.ready = True
        while httpx.get(url + "/ready", trust_env=False).status_code != 200:
            time.sleep(0.02)
        assert post(url).json()["host"] == a.url
    told = capsys.readouterr().err
    assert f"no requests to a host for now: {a.url} is not ready" in told and f"{a.url} takes requests now" in told


def test_models_of_one_name_must_be_alike(capsys):
    with Host({"sft": "1"}) as a, Host({"sft": "2"}) as b, fronted(a, b) as (front, url):
        assert {post(url).json()["host"] for _ in range(4)} in ({a.url}, {b.url})
        assert "serves sft otherwise than" in capsys.readouterr().err and len(front._ready()) == 1


def test_a_token_is_asked_for_and_sent(monkeypatch):
    monkeypatch.setenv(site.TOKEN, "secret")
    with Host({"sft": "1"}) as a, fronted(a) as (_, url):
        answers = [post(url, headers=h) for h in (None, {"Authorization": "Bearer secret", "X-Other": "mine"})]
        assert [x.status_code for x in answers] == [401, 200] and len(a.bodies) == 1
        assert {h["authorization"] for h in a.headers} == {"Bearer secret"} and "x-other" not in a.headers[-1]


def test_images_come_from_the_host_that_keeps_them():
    with Host({"sft": "1"}) as a, Host({"sft": "1"}) as b, fronted(a, b) as (_, url):
        get = lambda name: httpx.get(f"{url}/v1/xomni/images/{name}.png", trust_env=False)
        assert get(f"image-{b.port}").json()["of"] == b.url and get("image-1").status_code == get("..%5C..").status_code == 404
        post(url)
        post(url, headers={"X-Forwarded-Host": "draw.example"})  # of a front before this one
        told = [h.get("x-forwarded-host") for h in a.headers + b.headers]
        assert {url.removeprefix("http://"), "draw.example"} <= set(told)  # for the links of their answers


def test_a_client_that_leaves_frees_its_host():
    with Host({"sft": "1"}, "hold") as a, fronted(a) as (front, url), httpx.Client(trust_env=False, timeout=0.3) as leaving:
        with pytest.raises(httpx.ReadTimeout):
            leaving.post(url + IMAGES, json={"prompt": "a"})
        while front.hosts.all[0].in_flight:
            time.sleep(0.01)
        while not front.counts["gone"]:
            time.sleep(0.01)


def test_a_front_before_a_real_service(running):
    """OpenAI's client, streams and links, through a front before a front."""
    with fronted(running[1]) as (_, inner), fronted(inner) as (_, url):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        own = openai.OpenAI(base_url=running[1] + "/v1", api_key="none", max_retries=0)
        draw = lambda c, **how: c.images.generate(prompt="a", extra_body={"seed": 1}, **how)
        assert draw(client).data == draw(own).data
        events = list(draw(client, stream=True, partial_images=1))
        assert [e.type.partition(".")[2] for e in events] == ["partial_image", "completed"]
        link = draw(client, response_format="url").data[0].url
        assert link.startswith(url) and httpx.get(link, trust_env=False).content[:4] == b"\x89PNG"
        assert [m.id for m in client.models.list()] == ["sft", "rl"]
        for body, told in ((b'{"prompt": 1}', "`str`"), (b"{", "no JSON"), (b"[]", "object"), (b"x" * (17 << 20), "larger than")):
            answer = httpx.post(url + IMAGES, content=body, headers={"Content-Type": "application/json"}, trust_env=False)
            assert answer.status_code in (400, 413) and told in answer.json()["error"]["message"]
        answer = post(url, "/v1/images/variations")
        assert answer.status_code == 400 and "images without a prompt are not drawn" in answer.json()["error"]["message"]
        assert httpx.get(url + "/", trust_env=False).text.startswith("<!doctype html>")


@pytest.mark.parametrize("line, told", [
    ("--front ftp://a:1", "--front 'ftp://a:1' is no address of a service; write http://HOST:PORT"),
    ("--front http://a:1/v1", "is no address of a service"),
    ("--front http://a:1 --front http://a:1/", "--front http://a:1 is given twice"),
    ("--front http://a:1 --slots 4", "--slots is for a service that holds a model"),
    ("--front http://a:1 --temperature 0", "--temperature is for a service that holds a model"),
])  # fmt: skip
def test_refusals_of_the_command(line, told, capsys, settings):  # noqa: F811
    assert told in refusal(capsys, "serve", *line.split(), "--port", "0")
