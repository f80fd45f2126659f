"""Scores between processes: every process asks for its own images and gets those of all."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from xomni_jax.core.preemption import StepRefused, StopRequested
from xomni_jax.rewards import Score
from xomni_jax.rl import rollouts

OTHERS = [[Score(0.1, None, {"text": "A"}), Score(None, "timed out")], [Score(None), Score(1 / 3)]]  # per chunk, of rows 1 and 3
OWN = [[Score(0.5, None, {"text": "B"}), Score(0.25)], [Score(None, "no answer"), Score(None)]]  # rows 0 and 2


def exchange(monkeypatch, wait, others=OTHERS):
    """What one of two processes gets; the other one's scores are `others`."""

    def gather(value):
        value = json.loads(json.dumps(value))
        told = [{"ocr": [{"value": s.value, "error": s.error} for s in chunk]} for chunk in others]
        return [value, {"rows": [1, 3], "chunks": told}]

    polled = []
    monkeypatch.setattr(rollouts, "gather_json", gather)
    stop = SimpleNamespace(check=lambda: polled.append(1), check_waiting=None)
    client = SimpleNamespace(wait=wait, score_async=lambda images, items: items[0]["chunk"])
    scoring = rollouts.Scoring({"ocr": client}, [{"chunk": n // 4} for n in range(8)], [0, 2], 4, stop)
    scoring.decoding = [jnp.zeros((4, 2, 2, 3), jnp.uint8)] * 2
    scoring.send(wait=True)
    scores = scoring.scores()["ocr"]
    assert polled == [1]
    return scores


def test_rows_of_all_processes_in_order(monkeypatch):
    scores = exchange(monkeypatch, lambda chunk, poll: OWN[chunk])
    assert scores[:4] == [Score(0.5), Score(0.1), Score(0.25), Score(None, "timed out")]  # details stay where they are
    assert scores[4:] == [Score(None, "no answer"), Score(None), Score(None), Score(1 / 3)]


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
    made = SimpleNamespace(cfg=rollouts.RolloutConfig(), weights={"ocr": 1.0, "taste": 0.0}, clients={"ocr": client, "taste": client})
    with pytest.raises(StepRefused, match=told):
        rollouts.Rollouts.check_scored(made, scores, 0.75)
    rollouts.Rollouts.check_scored(made, scores, 0.5)


def test_a_process_that_is_told_to_stop_still_takes_part(monkeypatch):
    def told(chunk, poll):
        raise StopRequested

    assert exchange(monkeypatch, told)[:2] == [None, Score(0.1)]
