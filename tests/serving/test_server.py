"""The service over HTTP: OpenAI's own client, what requests draw beside each other, and refusals in one sentence."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.serving.fuzz import fuzz
from tests.serving.running import image_of, uri_of
from xomni_jax.serving import app

PROMPTS = ["a", 'a red sign that says "AB"', "two blue circles", "b", "c d"]
IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


@pytest.fixture(scope="module")
def url(running):
    return running[1]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def post(url, path=IMAGES, headers=None, **body):
    return httpx.post(url + path, json=body, headers=headers, timeout=60, trust_env=False)


def codes_of(answer):
    return [entry["codes"] for entry in answer.json()["data"]]


def test_the_official_client_draws_what_the_pipeline_draws(client, model):
    answer = client.images.generate(prompt=PROMPTS[1], model="sft", n=2, size="32x16", extra_body={"seed": 3})
    images = [image_of(entry.b64_json) for entry in answer.data]
    for image, own in zip(images, model.generate([PROMPTS[1]] * 2, seed=3), strict=True):
        np.testing.assert_array_equal(image, own)
    assert answer.usage.output_tokens == 16 and answer.size == "32x16"
    about = json.loads(images[1].text["xomni"])
    assert (
        images[1].text["prompt"] == PROMPTS[1]
        and (about["seed"], about["index"], about["top_k"]) == (3, 1, 50)
        and len(about["hash"]) == 16
    )
    assert [m.id for m in client.models.list()] == ["sft", "rl"] and client.models.retrieve("sft").owned_by == "xomni"


def test_the_official_client_streams_images(client):
    events = list(client.images.generate(prompt="a", stream=True, partial_images=3, extra_body={"seed": 1}))
    assert [e.type.partition(".")[2] for e in events] == ["partial_image"] * 3 + ["completed"]
    grey = [np.mean(np.all(np.asarray(image_of(e.b64_json)) == 128, axis=-1)) for e in events]
    assert grey == sorted(grey, reverse=True) and grey[0] >= 0.75 and grey[3] < 0.25  # a random model's own pixels are rarely grey
    alone = client.images.generate(prompt="a", extra_body={"seed": 1})
    assert alone.data[0].b64_json == events[-1].b64_json


def test_urls_are_kept_for_a_while(client, url):
    link = client.images.generate(prompt="a", response_format="url", extra_body={"seed": 1}).data[0].url
    answer = httpx.get(link, trust_env=False)
    assert answer.headers["content-type"] == "image/png" and answer.content[:4] == b"\x89PNG"
    assert httpx.get(link.replace("image-", "image-x"), trust_env=False).status_code == 404


def test_requests_that_share_a_batch_draw_what_they_draw_alone(url):
    """Codes to the bit, with settings of their own, whatever joins and leaves."""
    chosen = [{}, {"temperature": 0.7}, {"top_k": 3}, {"n": 3}, {"temperature": 0.0}]
    bodies = [dict(prompt=p, seed=n, return_codes=True, **s) for n, (p, s) in enumerate(zip(PROMPTS, chosen))]
    alone = [codes_of(post(url, **body)) for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda body: codes_of(post(url, **body)), bodies * 2))
    assert together == alone * 2 and len(alone[3]) == 3
    assert codes_of(post(url, prompt=PROMPTS[3], seed=3, n=1, index=2, return_codes=True))[0] == alone[3][2]


def test_the_official_client_asks_about_an_image(client, model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8))
    own = model.chat(image, "what is it?", 8)
    content = [{"type": "image_url", "image_url": {"url": uri_of(image)}}, {"type": "text", "text": "what is it?"}]
    asked = dict(model="sft", messages=[{"role": "user", "content": content}], max_tokens=8)
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == own and answer.usage.completion_tokens <= 8
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == own
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason and chunks[-1].usage == answer.usage
    several = [
        {"role": "system", "content": "be brief"},
        *asked["messages"],
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "and?"},
    ]
    drawn = [client.chat.completions.create(model="sft", messages=several, temperature=0.9, seed=4, max_tokens=8) for _ in range(2)]
    assert drawn[0].choices == drawn[1].choices


def test_the_best_by_a_reward(url):
    body = dict(prompt='a sign "AB"', seed=2, best_of=4, reward="dark", n=4)
    answer = post(url, **body).json()["data"]
    values = [entry["reward"]["value"] for entry in answer]
    assert values[:3] == sorted(values[:3], reverse=True) and values[3] is None and answer[3]["index"] == 2
    means = [-np.asarray(image_of(entry["b64_json"])).mean() for entry in answer[:3]]
    np.testing.assert_allclose(means, values[:3])


def test_encode_reconstruct_and_entropy(url, model):
    image = model.generate("a", seed=0)[0]
    told = post(url, "/v1/xomni/encode", image=uri_of(image), reconstruct=True).json()
    np.testing.assert_array_equal(told["codes"], model.encode([image])[0])
    np.testing.assert_array_equal(image_of(told["b64_json"]), model.decode([told["codes"]], [""])[0])
    entropy = np.array(post(url, "/v1/xomni/entropy", prompt="a", codes=told["codes"]).json()["entropy"])
    ids = np.append(model.tokenizer.generation_prompt("a", 2, 4), np.ravel(told["codes"]) + model.config("transformer").vocab_size)
    logits = np.asarray(model.logits(ids[None], "image"))[0, -9:-1, model.config("transformer").vocab_size :][:, :64].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy.ravel(), -(p * np.log(p)).sum(-1), atol=1e-4)  # it is rounded to four digits


def shown(url):
    """A question about the image of a URL."""
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize("path, body, status, told", [
    (IMAGES, {}, 400, "missing required field `prompt`"),
    (IMAGES, {"prompt": "a", "colour": 1}, 400, "contains unknown field `colour`"),
    (IMAGES, {"prompt": "a", "n": 9}, 400, "9 images are more than the 8 of one request"),
    (IMAGES, {"prompt": "a", "n": 0}, 400, ">= 1"),
    (IMAGES, {"prompt": " "}, 400, "prompt 1 is empty"),
    (IMAGES, {"prompt": "sign " * 40}, 400, "this model's decoder takes 31; shorten it"),
    (IMAGES, {"prompt": "<MM-Token-1>"}, 400, "contains the multimodal token"),
    (IMAGES, {"prompt": "a", "size": "1024x1024"}, 400, "size 1024x1024 is not served by sft; the nearest ones: 32x16"),
    (IMAGES, {"prompt": "a", "size": "big"}, 400, "'big' is no size; write WIDTHxHEIGHT"),
    (IMAGES, {"prompt": "a", "temperature": 1e-9}, 400, "too small to divide logits by"),
    (IMAGES, {"prompt": "a", "model": "large"}, 404, "there is no model 'large' here; use one of sft, rl"),
    (IMAGES, {"prompt": "a", "best_of": 2, "reward": "ocr"}, 400, "best_of needs a reward of this service (dark)"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "holds no question"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "the last message must be the user's"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 17}, 400, "more than the 16 of this service"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 200}]}, 400, "this service takes 64; shorten it"),
    (CHAT, shown("http://localhost/x.png"), 400, "regex"),
    (CHAT, shown("file:///etc/passwd"), 400, "regex"),
    (CHAT, shown("data:image/png;base64,AAAA"), 400, "cannot be read"),
    ("/v1/xomni/entropy", {"prompt": "a", "codes": [[1, 2], [3]]}, 400, "rows of one length"),
    ("/v1/xomni/entropy", {"prompt": "a", "codes": [[1, 64]]}, 400, "from 0 to 63"),
    ("/v1/images/edits", {}, 415, "the body must be multipart/form-data"),
    ("/v1/images/variations", {}, 400, "images without a prompt are not drawn; use /v1/images/edits"),
    ("/v1/nothing", {}, 404, "no such path"),
    ("/health", {}, 405, "takes another method"),
])  # fmt: skip
def test_refusals(url, path, body, status, told):
    answer = post(url, path, **body)
    error = answer.json()["error"]
    assert answer.status_code == status and told in error["message"] and "\n" not in error["message"] and error["type"]
    assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in answer.headers["content-security-policy"]


def test_other_bodies_hosts_and_types(url):
    ask = lambda content, **headers: httpx.post(
        url + IMAGES, content=content, headers={"Content-Type": "application/json"} | headers, trust_env=False
    )
    assert ask(b"{").status_code == ask(b"\xff").status_code == ask(b"[" * 100_000).status_code == 400
    assert ask(b"{}", **{"Content-Type": "text/plain"}).status_code == 415  # what a form of another site could send
    assert ask(b"x" * (17 << 20)).status_code == 413
    answer = ask(b'{"prompt": "a"}', Host="evil.example:80")
    assert answer.status_code == 403 and "127.0.0.1 and localhost alone" in answer.json()["error"]["message"]


def test_health_and_metrics(url, client):
    assert httpx.get(url + "/ready", trust_env=False).json()["status"] == "ok"
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(url + "/metrics", trust_env=False).text.splitlines() if line[0] != "#")
    assert float(lines["xomni_serve_images_total"]) > 0 and lines["xomni_serve_ready"] == "1" and lines["xomni_serve_queue"] == "0"
    assert set(httpx.get(url + "/openapi.json", trust_env=False).json()["paths"]) > {IMAGES, CHAT}


def test_a_full_queue_a_client_that_leaves_and_a_deadline(running, monkeypatch):
    state, url = running
    hold, stepped, submit, submitted = threading.Semaphore(0), state.service.scheduler._step, state.service.scheduler.submit, []
    monkeypatch.setattr(state.service.scheduler, "submit", lambda job: (submit(job), submitted.append(job)))
    monkeypatch.setattr(state.service.scheduler, "_step", lambda key, lane: (hold.acquire(), stepped(key, lane)))
    body = {"prompt": "a", "n": 8, "seed": 1}
    with ThreadPoolExecutor(4) as pool, httpx.Client(trust_env=False) as leaving:
        first = [pool.submit(post, url, **body) for _ in range(2)]
        while state.service.scheduler.waiting < 16:
            time.sleep(0.01)
        refused = post(url, **body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error" and "wait already" in refused.json()["error"]["message"]
        hold.release(5)
        while state.service.scheduler.waiting > 8:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            leaving.post(url + IMAGES, json=body | {"n": 4}, timeout=0.3)
        while not state.counts["gone"]:
            time.sleep(0.01)
        monkeypatch.setattr(state.service, "options", state.service.options)
        object.__setattr__(state.service.options, "deadline_seconds", -1.0)
        count, late = len(submitted), pool.submit(post, url, prompt="b")
        while len(submitted) == count:
            time.sleep(0.01)
        object.__setattr__(state.service.options, "deadline_seconds", 600.0)
        hold.release(1000)
        assert [len(answer.result().json()["data"]) for answer in first] == [8, 8]
        assert late.result().status_code == 504 and "not done in time" in late.result().json()["error"]["message"]
    assert state.counts["gone"] == 1 and state.service.scheduler.waiting == state.service.scheduler.running == 0


def test_a_token(running, monkeypatch):
    state, url = running
    monkeypatch.setattr(state, "token", "secret")
    answers = [post(url, headers=h, prompt="a") for h in (None, {"Authorization": "Bearer secreT"}, {"Authorization": "Bearer secret"})]
    assert [a.status_code for a in answers] == [401, 401, 200] and app.TOKEN in answers[0].json()["error"]["message"]
    assert httpx.get(url + "/v1/models", trust_env=False).status_code == 401


def test_the_command(model_dir):
    """It says where it is ready, and ends in good order."""
    command = [sys.executable, "-m", "xomni_jax.cli.main", "serve", "--model", f"a={model_dir}", "--slots", "1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("xomni serve (a) ready on http://127.0.0.1:"), line + process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""


def test_a_process_of_several_is_refused(monkeypatch, capsys, model_dir):
    for name, value in {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "XOMNI_PROCESSES": "2", "XOMNI_PROCESS": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "on the devices of one process, and this is one of several" in refusal(capsys, "serve", "--model", str(model_dir))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", "/nowhere"], "/nowhere: no such directory"),
        (["--model", "a=MODEL", "--model", "a=MODEL"], "two models are called a"),
        (["--sizes", "30x16"], "16x30 pixels are not whole 8x8 tokens; the nearest size that is: 16x32"),
        (["--sizes", "big"], "--sizes 'big' is no size"),
        (["--slots", "0"], "--slots 0 must be at least 1"),
        (["--reward", "ocr"], "--reward 'ocr' is not NAME=URL"),
        (["--port", "99999"], "--port 99999 is no port"),
        (["--tls-cert", "/nowhere"], "must both name files"),
    ],
)
def test_what_cannot_be_served_is_told(arguments, told, model_dir, capsys):
    given = [word.replace("MODEL", str(model_dir)) for word in arguments]
    assert told in refusal(capsys, "serve", *given, *(["--model", str(model_dir)] if "--model" not in given else []))


def test_mutated_bodies_are_answered_or_refused(url):
    met = fuzz(url, 200)
    assert met[200] > 20 and met[400] > 50 and set(met) <= {200, 400, 404, 413, 415, 429}
