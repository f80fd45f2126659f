"""A model behind an OpenAI-compatible endpoint as a judge, and everything that such an endpoint does wrong."""

import base64
import io
import re

import pytest
from PIL import Image

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.judges.chat import ChatEndpoint, ChatJudge
from xomni_jax.evaluation.suite import JudgeUnavailable, SuiteError
from xomni_jax.evaluation.suites import get_suite

PICTURE = Image.new("RGB", (12, 8), (200, 10, 10))
ASK = {"instruction": "Read.", "max_tokens": 77}


def judge(endpoint, **options):
    return ChatJudge(ChatEndpoint("tiny-vlm", endpoint.url, timeout=options.pop("timeout", 5), pause=0.01, attempts=3), **options)


def test_what_is_sent_and_what_comes_back():
    with fake_endpoint("say SALE") as endpoint:
        judged = open_judge("ocr", f"tiny-vlm@{endpoint.url}")
        assert judged.ask([PICTURE, PICTURE], [[ASK], [ASK | {"format": "JPEG"}]]) == [["SALE"], ["SALE"]]
        assert judged.name == "tiny-vlm"
        assert judged.settings == {"model": "tiny-vlm", "temperature": 0, "official judge": "Qwen2.5-VL-7B-Instruct"}
        judged.close()
    kinds = set()
    for body in endpoint.asked:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny-vlm", 77, 0)
        image, text = body["messages"][0]["content"]
        kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", image["image_url"]["url"]).groups()
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (12, 8) and text == {"type": "text", "text": "Read."}
        kinds.add(kind)
    assert kinds == {"png", "jpeg"} and "Authorization" not in endpoint.headers[0]


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    with fake_endpoint("say x") as endpoint:
        judge(endpoint).ask([PICTURE], [[ASK]])
    assert endpoint.headers[0]["Authorization"] == "Bearer secret-of-the-test"


@pytest.mark.parametrize("trouble", ["500", "garbage", "no choice", "two choices", "no text", "drop"])
def test_a_passing_trouble_is_retried(trouble):
    with fake_endpoint(trouble, trouble, "say SALE") as endpoint:
        assert judge(endpoint).ask([PICTURE], [[ASK]]) == [["SALE"]]
        assert len(endpoint.asked) == 3


@pytest.mark.parametrize("trouble", ["500", "garbage", "two choices", "drop"])
def test_a_lasting_trouble_is_no_score(trouble):
    message = "no usable reply .*3 failed tries.*run the command again"
    with fake_endpoint(trouble) as endpoint, pytest.raises(JudgeUnavailable, match=message):
        judge(endpoint).ask([PICTURE], [[ASK]])


def test_busy_is_waited_for_without_counting_tries():
    with fake_endpoint(*["429"] * 6, "say SALE") as endpoint:
        assert judge(endpoint).ask([PICTURE], [[ASK]]) == [["SALE"]]


def test_a_refusal_is_not_repeated():
    with fake_endpoint("400") as endpoint:
        with pytest.raises(JudgeUnavailable, match=r"refuses \(400\): .*a sentence from the server"):
            judge(endpoint).ask([PICTURE], [[ASK]])
        assert len(endpoint.asked) == 1


def test_waits_are_bounded():
    with fake_endpoint("hang") as endpoint:
        with pytest.raises(JudgeUnavailable, match="ReadTimeout"):
            judge(endpoint, timeout=0.1).ask([PICTURE], [[ASK]])
    with fake_endpoint("429") as endpoint, pytest.raises(JudgeUnavailable, match="it is busy"):
        judge(endpoint, max_wait=0.3).ask([PICTURE], [[ASK]])


def test_one_failure_among_many_fails_the_batch_and_keeps_order_otherwise():
    images = [PICTURE] * 5
    with fake_endpoint("say 0", "400", "say 1") as endpoint, pytest.raises(JudgeUnavailable):
        judge(endpoint).ask(images, [[ASK]] * 5)
    with fake_endpoint("slow", "say same") as endpoint:
        assert judge(endpoint, concurrency=2).ask(images, [[ASK]] * 5).count(["same"]) == 4


def test_the_endpoint_is_checked_before_anything_is_drawn():
    with fake_endpoint("401") as endpoint, pytest.raises(JudgeUnavailable, match="environment variable OPENAI_API_KEY"):
        judge(endpoint)
    with fake_endpoint("say x", models=["other"]) as endpoint:
        with pytest.raises(JudgeUnavailable, match="has no model 'tiny-vlm'; it serves other"):
            judge(endpoint)
    with fake_endpoint("say x", models=None) as endpoint:
        assert judge(endpoint).ask([PICTURE], [[ASK]]) == [["x"]]
        gone = endpoint.url
    with pytest.raises(JudgeUnavailable, match="no model answers at http://127.0.0.1:.*start the server"):
        open_judge("vqa", f"tiny-vlm@{gone}")


@pytest.mark.parametrize(
    ("reply", "read"), [("Yes.", "yes"), (" no\n", "no"), ("YES!", "yes"), ("maybe", "maybe"), ("yes it is", "yes it is")]
)
def test_yes_and_no_are_recognised(reply, read):
    with fake_endpoint(f"say {reply}") as endpoint:
        assert judge(endpoint).ask([PICTURE], [[ASK | {"answers": ["yes", "no"]}]]) == [[read]]


def test_a_black_image_is_not_shown():
    black = Image.new("RGB", (12, 8))
    with fake_endpoint("say x") as endpoint:
        asked = [ASK | {"black": "skip"}]
        assert judge(endpoint).ask([black, PICTURE, black], [asked, asked, [ASK]]) == [[None], ["x"], ["x"]]
        assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("vqa", None, "a judge of kind 'vqa' is needed and no --judge was given; it can be MODEL@URL"),
        ("detector", "pp-ocr", "xomni serve-reward detector"),
        ("detector", "m@http://x", "xomni serve-reward detector"),
        ("ocr", "contours", "it can be pp-ocr"),
        ("ocr", "@http://x", "it can be pp-ocr"),
        ("nose", None, "no judge of kind 'nose'"),
        ("detector", "http://127.0.0.1:9", "no reward service answers at http://127.0.0.1:9 .*xomni serve-reward detector"),
    ],
)
def test_what_a_judge_can_be(kind, spec, message):
    with pytest.raises(SuiteError, match=message):
        open_judge(kind, spec)


def test_official_ocr_instruction_from_the_user_is_what_the_judge_is_asked():
    suite = get_suite("longtext-en", instructions={"ocr": "Exact words."})
    assert suite.questions(None) == ({"instruction": "Exact words.", "max_tokens": 1024},)
