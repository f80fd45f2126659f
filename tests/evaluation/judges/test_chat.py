"""A model behind an OpenAI-compatible endpoint as a judge, and everything that such an endpoint does wrong."""

import base64
import io
import re

import pytest
from PIL import Image

from tests.evaluation.judges.fake_endpoint import fake_endpoint
from xomni_jax.evaluation.judges import open_judge
from xomni_jax.evaluation.judges.chat import ChatJudge
from xomni_jax.evaluation.judges.detections import check_detections
from xomni_jax.evaluation.judges.preparation import ChatOptions
from xomni_jax.evaluation.suite import JudgeUnavailable, SuiteError, is_unreadable
from xomni_jax.evaluation.suites import get_suite
from xomni_jax.rewards.chat.endpoint import ChatEndpoint

PICTURE = Image.new("RGB", (12, 8), (200, 10, 10))
ASK = {"instruction": "Read.", "max_tokens": 77}


def judge(endpoint, timeout=5, max_wait=900, **options):
    model = ChatEndpoint("tiny-vlm", endpoint.url, timeout=timeout, max_wait=max_wait, pause=0.01, attempts=3)
    model.check()
    return ChatJudge(model, ChatOptions(**options))


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
        open_judge("vqa", f"tiny-vlm@{endpoint.url}")
    with fake_endpoint("say x", models=["other"]) as endpoint:
        with pytest.raises(JudgeUnavailable, match="has no model 'tiny-vlm'; it serves other"):
            open_judge("vqa", f"tiny-vlm@{endpoint.url}")
    with fake_endpoint("say x", models=None) as endpoint:
        assert judge(endpoint).ask([PICTURE], [[ASK]]) == [["x"]]
        gone = endpoint.url
    with pytest.raises(JudgeUnavailable, match="no model answers at http://127.0.0.1:.*start the server"):
        open_judge("vqa", f"tiny-vlm@{gone}")


REPLIES = [  # message, finish_reason, what an OCR question and what a yes/no question read from it; None: unreadable
    ({"content": "<think>The sign should read OPEN.</think>\n\nNo text recognized."}, "stop", "No text recognized.", "no"),
    ({"content": "It could say yes.</think>no"}, "stop", "no", "no"),
    ({"content": "<thinking>yes or no</thinking>\n\n**Yes**"}, "stop", "**Yes**", "yes"),
    ({"content": "[THINK]no[/THINK]yes."}, "stop", "yes.", "yes"),
    ({"content": "\u25c1think\u25b7no\u25c1/think\u25b7 YES!"}, "stop", "YES!", "yes"),
    ({"content": "<think>a</think><answer>No, there is none.</answer>"}, "stop", "No, there is none.", "no"),
    ({"content": "<think>a</think><|begin_of_box|>Yes<|end_of_box|>"}, "stop", "Yes", "yes"),
    ({"content": "no", "reasoning_content": "is it yes?"}, "stop", "no", "no"),
    ({"content": None, "reasoning_content": "yes"}, "stop", None, None),
    ({"content": "", "reasoning": "yes"}, "stop", None, None),
    ({"content": "<think>The sign reads OPEN"}, "length", None, None),
    ({"content": None, "reasoning_content": "The sign reads"}, "length", None, None),
    ({"content": None}, "length", None, None),
    ({"content": "<think>yes</think>  "}, "stop", None, None),
    ({"content": [{"type": "text", "text": "yes, "}, {"type": "text", "text": "it is"}]}, "stop", "yes, it is", "yes"),
    ({"content": [{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "Yes"}]}, "stop", "Yes", "yes"),
    ({"content": [{"type": "reasoning", "text": "no"}]}, "stop", None, None),
    ({"content": None, "refusal": "I cannot help"}, "stop", None, None),
    ({"content": "yes"}, "content_filter", None, None),
    ({"content": ""}, "stop", "", None),
    ({"content": "OPEN OPEN OPEN"}, "length", "OPEN OPEN OPEN", None),
    ({"content": " no\n"}, "stop", " no\n", "no"),
    ({"content": "Yes, there is"}, "length", "Yes, there is", "yes"),
    ({"content": "The answer is: **no**"}, "stop", "The answer is: **no**", "no"),
    ({"content": '{"answer": "yes"}'}, "stop", '{"answer": "yes"}', "yes"),
    ({"content": "maybe"}, "stop", "maybe", None),
    ({"content": "Nothing of that kind"}, "stop", "Nothing of that kind", None),
    ({"content": "It is impossible to say yes or no"}, "stop", "It is impossible to say yes or no", None),
]


@pytest.mark.parametrize(("message", "finish", "text", "chosen"), REPLIES)
def test_the_answer_is_what_follows_the_thinking(message, finish, text, chosen):
    with fake_endpoint({"message": message, "finish_reason": finish}) as endpoint:
        ((read, answer),) = judge(endpoint).ask([PICTURE], [[ASK, ASK | {"answers": ["yes", "no"]}]])
    assert is_unreadable(read) if text is None else read == text
    assert is_unreadable(answer) if chosen is None else answer == chosen


def cut(text, **message):
    return {"message": {"content": text, **message}, "finish_reason": "length"}


def test_a_reply_that_was_cut_gets_room_for_thinking():
    """Thinking without its opening mark looks like text as long as it is cut."""
    with fake_endpoint(cut("The sign reads"), "say The sign reads OP...</think>OPEN") as endpoint:
        assert judge(endpoint, thinking_tokens=1000).ask([PICTURE], [[ASK]]) == [["OPEN"]]
        assert [body["max_tokens"] for body in endpoint.asked] == [77, 1077]
    with fake_endpoint(cut("one two"), "say one two three") as endpoint:  # no thinking: as an official scorer would have it
        assert judge(endpoint).ask([PICTURE], [[ASK]]) == [["one two"]]
    with fake_endpoint(cut("<think>no"), cut("<think>no, it is")) as endpoint:
        ((reply,),) = judge(endpoint, thinking_tokens=23).ask([PICTURE], [[ASK]])
        assert reply == {"unreadable": "no answer: the 100 tokens were used up by thinking, raise --thinking-tokens"}
    with fake_endpoint(cut("Yes, it shows a")) as endpoint:  # said before the cut
        assert judge(endpoint).ask([PICTURE], [[ASK | {"answers": ["yes", "no"]}]]) == [["yes"]]
        assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "found, wrong",
    [
        ({"cow": "many"}, "the detections of 'cow' are 'many', not a list"),
        ([], r"the detections are \[\], not lists of boxes by class"),
        (None, "the detections are missing"),
        ({"cow": ["x"]}, "a detection of 'cow' is 'x', not an object"),
        ({"cow": [{"box": [1, 2], "score": 0.5}]}, r"the box of a 'cow' is \[1, 2\], not four numbers"),
        ({"cow": [{"score": 0.5}]}, "the box of a 'cow' is missing"),
        ({"cow": [{"box": [0, 0, 1, float("inf")], "score": 0.5}]}, "not four numbers"),
        ({"cow": [{"box": [0, 0, 1, True], "score": 0.5}]}, "not four numbers"),
        ({"cow": [{"box": [0, 0, 1, 1], "score": "high"}]}, "the score of a 'cow' is 'high', not a number from 0 to 1"),
        ({"cow": [{"box": [0, 0, 1, 1], "score": float("nan")}]}, "the score of a 'cow' is nan"),
        ({"cow": [{"box": [0, 0, 1, 1], "score": 7}]}, "the score of a 'cow' is 7"),
        ({"cow": [{"box": [0, 0, 1, 1], "score": 0.5}], "bus": [{"box": [0, 0, 1, 1], "score": 0.5}]}, "the color of a 'bus' is missing"),
    ],
)
def test_malformed_detections_are_refused_by_name(found, wrong):
    with pytest.raises(ValueError, match=wrong):
        check_detections(found, {"classes": ["cow", "bus"], "coloured": ["bus"]})


def test_good_detections_pass():
    box = {"box": [0, 0.5, 10, 20], "score": 1}
    check_detections({"cow": [box], "bus": [box | {"color": "red"}], "cat": []}, {"classes": ["cow", "bus", "cat"], "coloured": ["bus"]})


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_images_are_sent_in_the_format_that_is_asked_for(kind):
    with fake_endpoint("say x") as endpoint:
        judged = judge(endpoint, image_format=kind)
        judged.ask([PICTURE], [[ASK, ASK]])
    assert judged.settings["format"] == kind and len(endpoint.asked) == 2
    for body in endpoint.asked:
        head, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
        assert head == f"data:image/{kind.lower()};base64" and Image.open(io.BytesIO(base64.b64decode(data))).format == kind


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
