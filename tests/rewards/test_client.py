"""The client against services that fail in every way: waits are bounded, nothing is guessed, good neighbours are kept."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.miniature import ROOT
from tests.rewards.fake_service import fake_service
from tests.rewards.images import ocr_item, sign
from tests.rl.pixel_service import pixel_service
from xomni_jax.rewards.client import NoAnswer, RewardClient, RewardServiceError

FAST = {"backoff": 0.01, "timeout": 0.5, "max_wait": 3.0}


def images(n):
    """n 'encoded images' whose score the fake service derives from the byte."""
    return [bytes([k]) for k in range(n)]


def items(n):
    return [ocr_item("HI")] * n


def closed_port_url():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_order_is_kept_over_chunks_and_replicas():
    with (
        fake_service("slow", "ok") as a,
        fake_service("ok", "slow", "ok") as b,
        RewardClient("ocr", [a.url, b.url], chunk=3, **FAST) as c,
    ):
        assert [s.value for s in c.score(images(20), items(20))] == [k / 100 for k in range(20)]
        assert a.calls and b.calls and sum(a.calls) + sum(b.calls) == 20
        assert c.score([], []) == []


BAD = ["500", "garbage", "wrong count", "other id", "no keys", "cut", "drop"]


@pytest.mark.parametrize("step", BAD)
def test_bad_answers_are_retried(step):
    with fake_service(step, step, "ok") as s, RewardClient("ocr", s.url, **FAST) as c:
        assert [x.value for x in c.score(images(3), items(3))] == [0, 0.01, 0.02]
        assert len(s.calls) == 3


@pytest.mark.parametrize("step", BAD)
def test_lasting_failure_is_masked_never_zero(step):
    """A service that is up and answers with errors: the chunk is halved, and each image has tries of its own."""
    with fake_service(step) as s, RewardClient("ocr", s.url, attempts=2, **FAST) as c:
        scores = c.score(images(2), items(2))
        assert all(x.value is None and x.failed and x.applies and x.kind == "invalid" for x in scores)
        assert "after 2 failed tries" in scores[0].error and s.url in scores[0].error
        assert sorted(s.calls) == [1, 1, 1, 1, 2, 2]


def test_one_image_that_breaks_a_service_fails_alone():
    with fake_service("500 if bad") as s, RewardClient("ocr", s.url, attempts=2, **FAST) as c:
        assert [x.failed for x in c.score([*images(5), b"bad", *images(2)], items(8))] == [k == 5 for k in range(8)]


@pytest.mark.parametrize("step", ["404", "408", "425", "429", "502", "503", "504"])
def test_what_passes_is_waited_for_without_counting_as_a_try(step):
    with fake_service(*[step] * 4, "ok") as s, RewardClient("ocr", s.url, attempts=1, **FAST) as c:
        assert [x.value for x in c.score(images(2), items(2))] == [0, 0.01]
        assert len(s.calls) == 5


def test_a_repeated_request_keeps_its_id():
    with fake_service("503", "500", "ok") as s, RewardClient("ocr", s.url, **FAST) as c:
        c.score(images(2), items(2))
        assert len({message["id"] for message in s.messages}) == 1


def test_an_outage_is_waited_out():
    """Nobody listens for a while, more than all tries would take; then a service comes up."""
    port = int(closed_port_url().rpartition(":")[2])
    with RewardClient("ocr", f"http://127.0.0.1:{port}", attempts=1, say=lambda line: None, **FAST | {"max_wait": 30.0}) as c:
        future = c.score_async(images(8), items(8))
        time.sleep(0.5)
        with fake_service("ok", port=port):
            assert [x.value for x in future.result(timeout=30)] == [k / 100 for k in range(8)]


def test_images_that_nobody_answers_for_are_told_apart():
    with RewardClient("ocr", closed_port_url(), **FAST | {"max_wait": 0.3}) as c:
        (score,) = c.score(images(1), items(1))
    assert score.kind == "unanswered" and "nothing answered for 0.3 s" in score.error and "127.0.0.1" in score.error


def test_a_slow_service_loses_nothing():
    """Its chunks take longer than the limit of a request, and all of them longer than max_wait: they are halved, and answers reset it."""
    slow = {"chunk": 8, "concurrency": 1, "backoff": 0.01, "timeout": 0.4, "max_wait": 1.6}
    with fake_service("slow per image") as s, RewardClient("ocr", s.url, **slow) as c:
        assert [x.value for x in c.score(images(32), items(32))] == [k / 100 for k in range(32)]


def test_a_stopped_replica_is_left_alone():
    """It accepts connections and never answers: it costs one time-out, not one a chunk."""
    with socket.socket() as stopped, fake_service("ok") as s:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen(64)
        url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        with RewardClient("ocr", [s.url, url], chunk=1, **FAST) as c:
            assert not any(x.failed for _ in range(3) for x in c.score(images(8), items(8)))
            assert c.replicas.all[1].failures < 8 and len(s.calls) == 24


def test_another_replica_is_asked_when_one_takes_long():
    """Without it the answer would take as long as the time-out; both get the request under one id, and the slow one must prove itself."""
    with fake_service("hang") as stuck, fake_service("ok") as s:
        with RewardClient("ocr", [stuck.url, s.url], hedge=0.05, timeout=600.0, concurrency=1) as c:
            assert [x.value for x in c.score(images(2), items(2))] == [0, 0.01]
            assert [r.trusted for r in c.replicas.all] == [False, True] and [r.in_flight for r in c.replicas.all] == [0, 0]
            (first,), (second,) = stuck.messages, s.messages
            assert first["id"] == second["id"] and first["keys"] == second["keys"]


@pytest.mark.parametrize("other", ["500", "429", "nan"])
def test_a_hedge_that_fails_leaves_the_first_answer(other):
    with fake_service("slow") as slow, fake_service(other) as s:
        with RewardClient("ocr", [slow.url, s.url], hedge=0.05, **FAST | {"timeout": 30.0}) as c:
            assert [x.value for x in c.score(images(2), items(2))] == [0, 0.01]
            assert [r.failures for r in c.replicas.all] == [0, 1] and len(slow.calls) == len(s.calls) == 1


def test_requests_go_to_the_replica_with_fewest_under_way():
    with fake_service("slow") as slow, fake_service("ok") as quick, RewardClient("ocr", [slow.url, quick.url], chunk=1, **FAST) as c:
        c.score(images(30), items(30))
        assert len(slow.calls) < len(quick.calls)


def test_concurrency_is_that_of_the_configuration():
    with fake_service("slow") as s, RewardClient("ocr", s.url, chunk=1, concurrency=8, **FAST) as c:
        c.score(images(24), items(24))
        assert 4 < s.most_at_once <= 8


def test_groups_and_sets_stay_together():
    group = [ocr_item("HI") | {"group": g} for g in "aaabbbbccd"]
    with fake_service("ok", scope="group") as s, RewardClient("ocr", s.url, chunk=4, **FAST) as c:
        assert [x.value for x in c.score(images(10), group)] == [k / 100 for k in range(10)]
        assert sorted("".join(i["group"] for i in m["items"]) for m in s.messages) == ["aaa", "bbbb", "ccd"]
    with fake_service("ok", scope="set") as s, RewardClient("ocr", s.url, chunk=4, **FAST) as c:
        c.score(images(10), group)
        assert s.calls == [10]


@pytest.mark.parametrize(
    "about, limit, options", [({"range": [0, 1]}, "0 to 1", {}), ({}, "-10000 to 10000", {}), ({}, "0 to 2", {"range": (0, 2)})]
)
def test_a_value_out_of_range_is_no_reward(about, limit, options):
    with fake_service("far out", **about) as s, RewardClient("ocr", s.url, **FAST, **options) as c:
        bad, good = c.score(images(2), items(2))
    assert bad.kind == "invalid" and f"{s.url} gave 1e+30, which is outside {limit}" in bad.error and good.value == 0.01


def test_scores_follow_their_keys():
    with fake_service("shuffled") as s, RewardClient("ocr", s.url, **FAST) as c:
        assert [x.value for x in c.score(images(5), items(5))] == [k / 100 for k in range(5)]


def test_another_version_in_the_middle_of_a_run_is_a_fault():
    with fake_service("ok", "other version", version="1") as s, RewardClient("ocr", s.url, **FAST) as c:
        assert not c.score(images(1), items(1))[0].failed and c.replicas.identity == ("1", "")
        assert all(x.failed for x in c.score(images(2), items(2)))
        assert "version other, others were version 1" in c.replicas.fault
    said = []
    with fake_service("ok", "other version", version="1") as s, RewardClient("ocr", s.url, any_version=True, say=said.append, **FAST) as c:
        assert not any(x.failed for _ in range(2) for x in c.score(images(1), items(1)))
        assert not c.replicas.fault and "version other" in said[0]


def test_replicas_of_different_models_are_refused():
    with fake_service("ok", model_hash="a") as a, fake_service("ok", model_hash="b") as b, RewardClient("ocr", [a.url, b.url], **FAST) as c:
        with pytest.raises(RewardServiceError, match="version . of model [ab], others were"):
            c.connect()


def test_a_run_starts_with_the_replicas_that_answer():
    said = []
    with fake_service("ok", version="3") as s, RewardClient("ocr", [closed_port_url(), s.url], say=said.append, **FAST) as c:
        assert c.connect().version == "3" and "going on without it" in said[0]
    with RewardClient("ocr", closed_port_url(), say=said.append, poll_every=0.05, **FAST) as c, pytest.raises(NoAnswer):
        c.connect(wait=0.2)


def test_token_and_headers_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("XOMNI_REWARD_TOKEN", "secret")
    monkeypatch.setenv("PROJECT", "p1")
    with fake_service("ok") as s, RewardClient("ocr", s.url, headers=("X-Project: $PROJECT",), **FAST) as c:
        c.score(images(1), items(1))
        assert s.messages[0]["headers"]["Authorization"] == "Bearer secret" and s.messages[0]["headers"]["X-Project"] == "p1"
    for headers in (("X-Project: $ABSENT",), ("nonsense",)):
        with pytest.raises(RewardServiceError, match="is not 'Name: value', or its variable is not set"):
            RewardClient("ocr", "http://a", headers=headers)
    monkeypatch.delenv("XOMNI_REWARD_TOKEN")
    with (
        fake_service("ok", token=True) as s,
        RewardClient("ocr", s.url) as c,
        pytest.raises(RewardServiceError, match="needs a bearer token"),
    ):
        c.connect()


@pytest.mark.parametrize("step", ["429", "hang", "trickle", "trickling head", "500"])
def test_total_wait_is_bounded(step):
    with (
        fake_service(step) as s,
        RewardClient("ocr", s.url, attempts=100, backoff=0.01, timeout=0.3, max_wait=1.0, say=lambda line: None) as c,
    ):
        began = time.monotonic()
        assert all(x.failed for x in c.score(images(2), items(2)))
        assert time.monotonic() - began < 2.5


def test_time_out_then_success():
    with fake_service("hang", "ok") as s, RewardClient("ocr", s.url, **FAST) as c:
        assert [x.value for x in c.score(images(2), items(2))] == [0, 0.01]


def test_nan_fails_its_image_alone():
    """Once it is taken for an accident."""
    with fake_service("nan", "ok") as s, RewardClient("ocr", s.url, **FAST) as c:
        assert not any(x.failed for x in c.score(images(2), items(2)))
    with fake_service("nan if bad") as s, RewardClient("ocr", s.url, attempts=2, **FAST) as c:
        first, second = c.score([b"bad", b"\x01"], items(2))
        assert first.value is None and "the score nan, which is not finite" in first.error and second.value == 0.01


def test_error_and_not_applicable_are_different():
    with fake_service("error", "null") as s, RewardClient("ocr", s.url, **FAST) as c:
        (failed, fine), (absent,) = c.score(images(2), items(2)), c.score(images(1), items(1))
        assert failed.error == "the image is empty" and failed.applies and fine.value == 0.01
        assert absent.value is None and not absent.failed and not absent.applies


def test_refused_chunk_is_halved_until_the_culprit_is_alone():
    with fake_service("400 if bad") as s, RewardClient("ocr", s.url, **FAST) as c:
        scores = c.score([*images(5), b"bad", *images(2)], items(8))
        assert [x.failed for x in scores] == [k == 5 for k in range(8)]
        assert "refused (400)" in scores[5].error and [x.value for x in scores[6:]] == [0, 0.01]


def test_what_was_scored_is_kept_when_the_rest_is_not():
    """Of a halved chunk one half is answered, the other one is not in time."""
    with fake_service("400 if bad", "ok", "hang") as s, RewardClient("ocr", s.url, timeout=5.0, max_wait=1.0, concurrency=1) as c:
        scores = c.score([b"\x01", b"\x02", b"bad", b"\x03"], items(4))
        assert [x.value for x in scores] == [0.01, 0.02, None, None] and all(x.failed for x in scores[2:])


def test_dead_replica_is_replaced_by_a_live_one():
    with fake_service("ok") as s, RewardClient("ocr", [closed_port_url(), s.url], chunk=2, **FAST) as c:
        assert [x.value for x in c.score(images(12), items(12))] == [k / 100 for k in range(12)]


def test_other_scorer_is_not_believed():
    with fake_service("ok", scorer="shapes") as s, RewardClient("ocr", s.url, attempts=2, **FAST) as c:
        assert "serves 'shapes', not 'ocr'" in c.score(images(1), items(1))[0].error
        with pytest.raises(RewardServiceError, match="serves 'shapes', not 'ocr'"):
            c.health()


def test_an_older_service_is_refused():
    with fake_service("ok", schema=1) as s, RewardClient("ocr", s.url) as c, pytest.raises(RewardServiceError, match="speaks schema 1"):
        c.connect()


def test_health_names_url_and_command():
    url = closed_port_url()
    with RewardClient("ocr", url) as c, pytest.raises(RewardServiceError) as caught:
        c.health()
    assert url in str(caught.value) and f"xomni serve-reward ocr --port {url.rpartition(':')[2]}" in str(caught.value)


def test_async_overlaps_with_the_caller():
    with fake_service("slow") as s, RewardClient("ocr", s.url, **FAST) as c:
        began = time.monotonic()
        future = c.score_async(images(2), items(2))
        assert time.monotonic() - began < 0.2 and not future.done()
        assert [x.value for x in c.wait(future)] == [0, 0.01]


def test_poll_runs_while_waiting_and_may_abandon():
    class Preempted(Exception):
        pass

    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise Preempted

    with fake_service("hang") as s, RewardClient("ocr", s.url, poll=poll, poll_every=0.05, timeout=10) as c:
        began = time.monotonic()
        with pytest.raises(Preempted):
            c.score(images(2), items(2))
        assert time.monotonic() - began < 2


def test_close_abandons_waiting():
    with fake_service("429") as s:
        c = RewardClient("ocr", s.url, max_wait=60)
        future = c.score_async(images(2), items(2))
        threading.Timer(0.2, c.close).start()
        assert all(x.failed for x in c.wait(future))
        with pytest.raises(ValueError, match="is closed"):
            c.score(images(1), items(1))


def test_close_completes_queued_work():
    """Chunks that never started are failed as well: nobody waits for ever."""
    with fake_service("hang") as s:
        c = RewardClient("ocr", s.url, chunk=1, timeout=0.5)
        futures = [c.score_async(images(4), items(4)) for _ in range(3)]
        c.close()
        assert all(x.failed for f in futures for x in f.result(timeout=5))


LEAVES = """
from xomni_jax.rewards.client import RewardClient

class Told(Exception):
    pass

def told():
    raise Told

with RewardClient("ocr", {url!r}, timeout=600, max_wait=600, poll=told, poll_every=2) as client:
    try:
        client.score([b"0"], [{{}}])
    except Told:
        print("told to stop")
"""


def test_a_process_that_is_told_to_stop_does_not_stay_for_an_answer():
    over = threading.Event()
    with pixel_service(before=lambda call: over.wait(600)) as s:
        command = [sys.executable, "-c", LEAVES.format(url=s.url)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        finally:
            over.set()
    assert (done.returncode, done.stdout, done.stderr) == (0, "told to stop\n", "")


def test_images_that_cannot_be_sent_fail_alone():
    with fake_service("ok") as s, RewardClient("ocr", s.url, chunk=4, **FAST) as c:
        good, bad = c.score([sign("HI"), np.zeros((3, 3))], items(2))
        assert good.value is not None and "uint8 array" in bad.error


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(RewardServiceError, match="must begin with http"):
        RewardClient("ocr", ["127.0.0.1:8001"])
