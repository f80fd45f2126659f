"""Answers that a run keeps: equal questions are not asked again, failures and other versions are."""

from tests.rewards.fake_service import fake_service
from tests.rewards.images import ocr_item
from xomni_jax.rewards.answers import Answers, answer_key
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import Score

FAST = {"backoff": 0.01, "timeout": 5.0, "max_wait": 3.0}


def images(*values):
    """'Encoded images' whose score the fake service derives from the byte."""
    return [bytes([k]) for k in values]


def asked(service):
    """The images that a service was asked about."""
    return [image[0] for message in service.messages for image in message["images"]]


def score(service, file, values, item=ocr_item("HI"), progress=0.5, **options):
    """Scores by a client of a new process."""
    with RewardClient(service.scorer, service.url, answers=file, **FAST | options) as client:
        scores = client.wait(client.score_async(images(*values), [item] * len(values), progress))
    return [s.value for s in scores]


def test_a_repeated_step_asks_for_what_was_not_answered(tmp_path):
    file = tmp_path / "run" / "ocr.sqlite"
    with fake_service("ok", version="1") as s:
        assert score(s, file, [1, 2]) == [0.01, 0.02]
        assert score(s, file, [1, 3, 2, 3]) == [0.01, 0.03, 0.02, 0.03]
        assert asked(s) == [1, 2, 3, 3]
        for other in ({"item": ocr_item("HO")}, {"progress": 0.6}, {"range": (0.0, 1.0)}, {"cache": 0}):
            assert score(s, file, [1], **other) == [0.01] and asked(s)[-1] == 1
        assert len(asked(s)) == 8
    with fake_service("ok", version="2") as s:
        assert score(s, file, [1]) == [0.01] and asked(s) == [1]


def test_failures_are_asked_again(tmp_path):
    with fake_service("error", "ok") as s:
        assert score(s, tmp_path / "a", [1, 2]) == [None, 0.02]
        assert score(s, tmp_path / "a", [1, 2]) == [0.01, 0.02]
        assert asked(s) == [1, 2, 1]


def test_that_a_scorer_does_not_apply_is_an_answer(tmp_path):
    with fake_service("null", "ok") as s:
        assert score(s, tmp_path / "a", [1]) == score(s, tmp_path / "a", [1]) == [None]


def test_a_group_is_known_as_a_whole_and_a_set_never(tmp_path):
    group = ocr_item("HI") | {"group": "a"}
    with fake_service("ok", scope="group") as s:
        score(s, tmp_path / "group", [1, 2], group)
        score(s, tmp_path / "group", [1, 2], group)
        assert asked(s) == [1, 2]
        score(s, tmp_path / "group", [1, 3], group)
        assert asked(s) == [1, 2, 1, 3]
    with fake_service("ok", scope="set") as s:
        score(s, tmp_path / "set", [1, 2], group)
        score(s, tmp_path / "set", [1, 2], group)
        assert asked(s) == [1, 2, 1, 2]


def test_the_oldest_answers_make_room(tmp_path):
    answers, scores = Answers(tmp_path / "a", 3), [Score(0.5, None, {"text": "HI"})]
    for n in range(5):
        answers.keep({bytes([n]): scores})
    assert [answers.find(bytes([n])) for n in range(5)] == [None, None, scores, scores, scores]


def test_a_file_that_cannot_be_used_costs_no_score(tmp_path):
    (tmp_path / "damaged").write_bytes(b"no database" * 100)
    (tmp_path / "folder").mkdir()
    with fake_service("ok") as s:
        for _ in range(2):
            assert score(s, tmp_path / "damaged", [1]) == [0.01] and score(s, tmp_path / "folder", [2]) == [0.02]
        assert asked(s) == [1, 2, 2]


def test_keys_tell_images_apart():
    assert answer_key("ocr", [b"ab", b"c"], []) != answer_key("ocr", [b"a", b"bc"], [])
