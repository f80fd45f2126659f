"""Scores between processes: every process asks for its own images and gets those of all."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.cli.main import explain
from xomni_jax.core.preemption import Outage, StepRefused, StopRequested
from xomni_jax.rewards import Score
from xomni_jax.rl import grpo, prompts, rollouts
from xomni_jax.rl import scoring as score_exchange
from xomni_jax.rl.rewards import Rewards
from xomni_jax.sharding import arrays

OTHERS = [[Score(0.1, None, {"text": "A"}), Score(None, "timed out")], [Score(None), Score(1 / 3)]]  # per chunk, of rows 1 and 3
OWN = [[Score(0.5, None, {"text": "B"}), Score(0.25)], [Score(None, "no answer"), Score(None)]]  # rows 0 and 2


def exchange(monkeypatch, wait, others=OTHERS, faults=()):
    """What one of two processes gets; the other one's scores are `others`."""

    def gather(value):
        value = json.loads(json.dumps(value))
        there = [["ocr", 4 * c + row, s.value, s.error, s.kind] for c, chunk in enumerate(others) for row, s in zip([1, 3], chunk)]
        return [value, {"scores": there, "texts": [[2, 1, 1, 0]], "faults": faults}]

    polled = []
    monkeypatch.setattr(score_exchange, "gather_json", gather)
    stop = SimpleNamespace(check=lambda: polled.append(1), check_waiting=None)
    client = SimpleNamespace(wait=wait, score_async=lambda images, items, progress: items[0]["chunk"], replicas=SimpleNamespace(fault=""))
    items = [{"chunk": n // 4, "targets": {}} for n in range(8)]
    scoring = score_exchange.Scoring({"ocr": client}, items, [{"ocr"}] * 8, [0, 2], 4, stop)
    scoring.decoding = [jnp.zeros((4, 2, 2, 3), jnp.uint8)] * 2
    scoring.send(wait=True)
    scores = scoring.scores()["ocr"]
    assert polled == [1] and scoring.texts["text/repeated_frac"] in (1 / 3, 1 / 2)  # of three texts, or of the others' two
    return scores


def test_rows_of_all_processes_in_order(monkeypatch):
    scores = exchange(monkeypatch, lambda chunk, poll: OWN[chunk])
    assert scores[:4] == [Score(0.5), Score(0.1), Score(0.25), Score(None, "timed out")]  # details stay where they are
    assert scores[4:] == [Score(None, "no answer"), Score(None), Score(None), Score(1 / 3)]


def test_a_reward_is_asked_about_its_own_prompts_alone(monkeypatch):
    """Rows 0 and 2 of two chunks: ocr judges one prompt of the first chunk, shapes both of the first and none of the second."""
    heard = []

    def client(name):
        def score(images, items, progress):
            heard.append((name, [int(image[0, 0, 0]) for image in images], [item["n"] for item in items]))
            return [Score(item["n"] / 8) for item in items]

        return SimpleNamespace(score_async=score, wait=lambda scores, poll: scores, replicas=SimpleNamespace(fault=""))

    monkeypatch.setattr(score_exchange, "gather_json", lambda value: [json.loads(json.dumps(value))])
    stop = SimpleNamespace(check=lambda: None, check_waiting=None)
    judges = [{"shapes"}, (), {"ocr": 0.5, "shapes": 2.0}, (), {"taste"}, (), {"taste"}, ()]
    scoring = score_exchange.Scoring({n: client(n) for n in ("ocr", "shapes")}, [{"n": n} for n in range(8)], judges, [0, 2], 4, stop)
    scoring.decoding = [
        jnp.arange(4 * c, 4 * c + 4, dtype=jnp.uint8)[:, None, None, None] * jnp.ones((1, 2, 2, 3), jnp.uint8) for c in (0, 1)
    ]
    scoring.send(wait=True)
    scores = scoring.scores()
    assert heard == [("ocr", [2], [2]), ("shapes", [0, 2], [0, 2])]
    assert scores == {
        "ocr": [Score(0.25) if n == 2 else Score(None) for n in range(8)],
        "shapes": [Score(n / 8) if n in (0, 2) else Score(None) for n in range(8)],
    }


def test_hosts_exchange_prompts_of_different_sources(monkeypatch):
    """This one has rendered signs, which name no rewards; the other has prompts that name theirs."""
    there = {"caption": ["c", "d"], "targets": [{}, {}], "rewards": [{"ocr": 2.0}, None], "source": ["mine", "mine"]}
    monkeypatch.setattr(arrays, "gather_json", lambda own: [json.loads(json.dumps(own)), {"rows": [2, 3], "columns": there}])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    here = {"caption": ["a", "b"], "targets": [{"text": ["A"]}, {}], "source": ["signs", "signs"], "size": [(8, 16), (8, 16)], "id": [0, 1]}
    assert prompts.all_prompts(grpo.GRPORun(batch_size=4), [0, 1], here) == {
        "caption": ["a", "b", "c", "d"], "targets": [{"text": ["A"]}, {}, {}, {}], "rewards": [None, None, {"ocr": 2.0}, None],
        "source": ["signs", "signs", "mine", "mine"], "size": (8, 16),
    }  # fmt: skip


URL = "http://10.0.0.9:8001"


@pytest.mark.parametrize(
    "scores, told",
    [
        (
            {"ocr": [Score(None, f"ocr could not be scored after 4 failed tries: {URL}: no connection")] * 3 + [Score(1.0)]},
            f"75% of a step's rollouts .*50%.: ocr could not be scored after 4 failed tries: {URL}: no connection; start the",
        ),
        (
            {"ocr": [Score(None, "the worker process died")] * 2 + [Score(None, "other")] + [Score(1.0)], "taste": [Score(None, "x")] * 4},
            f": ocr at {URL}, http://b:2: the worker process died; start the service again",
        ),
        ({"ocr": [Score(None)] * 3 + [Score(1.0)]}, "no reward applies to them; give the prompts targets"),
    ],
)
def test_a_killed_service_is_named_with_its_address_and_the_cause(scores, told):
    client = SimpleNamespace(urls=(URL, "http://b:2"))
    made = SimpleNamespace(cfg=rollouts.RolloutConfig(), rewards=Rewards({}, {"ocr": client, "taste": client}))
    weights = {"ocr": np.array([[0.0], [1.0]]), "taste": np.zeros((2, 1))}
    with pytest.raises(StepRefused, match=told):
        rollouts.Rollouts.check_scored(made, scores, weights, 0.75)
    rollouts.Rollouts.check_scored(made, scores, weights, 0.5)


def test_an_outage_is_told_apart_from_what_the_user_must_mend():
    made = SimpleNamespace(cfg=rollouts.RolloutConfig(), rewards=Rewards({}, {"ocr": SimpleNamespace(urls=(URL,))}))
    with pytest.raises(Outage, match="ocr: nothing answered for 600 s") as caught:
        silent = [Score(None, "ocr: nothing answered for 600 s", kind="unanswered")] * 3
        rollouts.Rollouts.check_scored(made, {"ocr": [*silent, Score(1.0)]}, {"ocr": 1.0}, 0.75)
    assert explain("train", caught.value) == 75 and explain("train", StepRefused("no")) == 2


def test_every_process_hears_that_another_version_answers(monkeypatch):
    with pytest.raises(StepRefused, match="ocr at x is version 2"):
        exchange(monkeypatch, lambda chunk, poll: OWN[chunk], faults=["ocr at x is version 2"])


def test_each_reason_is_said_once_and_counted():
    said = []
    rewards = Rewards({}, {}, said.append)
    for n in range(12):
        failed = [Score(None, f"the image has {n} pixels"), Score(1.0), Score(None, "late", kind="unanswered")]
        assert rewards.failures({"ocr": failed}) == {"reward/ocr/failed_scorer": 1, "reward/ocr/failed_unanswered": 1}
    assert len(said) == 4 and "reward ocr: 1 images" in said[0] and "10 images could not be scored so far: the image has 9" in said[2]


def test_a_process_that_is_told_to_stop_still_takes_part(monkeypatch):
    def told(chunk, poll):
        raise StopRequested

    assert exchange(monkeypatch, told)[:2] == [Score(None), Score(0.1)]
