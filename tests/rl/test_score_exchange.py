"""Scores between processes: every process asks for its own images and gets those of all."""

import json
from types import SimpleNamespace

import jax.numpy as jnp

from xomni_jax.core.preemption import StopRequested
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


def test_a_process_that_is_told_to_stop_still_takes_part(monkeypatch):
    def told(chunk, poll):
        raise StopRequested

    assert exchange(monkeypatch, told)[:2] == [None, Score(0.1)]
