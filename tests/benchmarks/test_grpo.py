"""The parts of a GRPO step: sums by hand, and the order of the measurement with a trainer and services that are not there."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.benchmarks import grpo, services
from tests.benchmarks.timing import BenchError
from xomni_jax.rewards.protocol import Health
from xomni_jax.training.stage import load_config


def step(rollout, decode, reward, update, other=0.0):
    parts = dict(rollout=rollout, decode=decode, reward=reward, update=update, other=other)
    return parts | {"step": sum(parts.values())}


def test_summary_by_hand():
    overlapped = [step(2, 3, 1, 4), step(2, 3, 2, 3), step(2, 3, 0, 5)]
    serial = [step(2, 3, 4, 4, 2), step(2, 3, 4, 3), step(2, 3, 5, 5)]
    s = grpo.summary({"overlapped": overlapped, "serial": serial})
    assert s["step_seconds"] == step(2, 3, 1, 4) and s["serial_step_seconds"]["reward"] == 4
    assert s["overlap"] == {"scoring_seconds": 4, "waited_seconds": 1, "hidden_share": 0.75}
    assert s["serial_over_overlapped"] == {"median": 1.5, "min": 1.2, "max": 1.5}
    assert s["shares"] == pytest.approx({"rollout": 0.2, "decode": 0.3, "reward": 0.1, "update": 0.4, "other": 0.0})
    assert sum(s["shares"].values()) == pytest.approx(1)


def test_more_waiting_than_scoring_hides_nothing():
    s = grpo.summary({"overlapped": [step(1, 1, 3, 1)], "serial": [step(1, 1, 2, 1)]})
    assert s["overlap"]["hidden_share"] == 0.0


@pytest.fixture
def pretend(monkeypatch):
    """Fake services and stages; returns what they were asked."""
    asked = SimpleNamespace(workers=None, steps=[], urls=[], closed=[])

    @contextmanager
    def running(workers):
        asked.workers = dict(workers)
        yield {name: f"http://127.0.0.1:{n}" for n, name in enumerate(workers, 1)}

    class Client:
        def __init__(self, name, url):
            self.calls = 0

        def health(self):
            self.calls += 1
            return [Health(schema=1, scorer="ocr", busy_seconds=0.5 * self.calls)]

        def close(self):
            pass

    def make(config, mesh, stop):
        asked.urls.append(config.rewards["ocr"].urls)

        def take(state, batch, number):
            asked.steps.append((config.rollout.chunks, number, batch))
            waited = 0.5 if config.rollout.chunks == 1 else 0.125
            return state + 1, {"perf/rollout_s": 0.0, "perf/decode_s": 0.0, "perf/reward_wait_s": waited, "perf/update_s": 0.0}

        close = lambda: asked.closed.append(config.rollout.chunks)  # noqa: E731
        return SimpleNamespace(state=jnp.float32(0), step=take, batches=iter(range(100)), close=close)

    monkeypatch.setattr(grpo, "running", running)
    monkeypatch.setattr(grpo, "RewardClient", Client)
    monkeypatch.setattr(grpo.grpo.GRPOStage, "make", make)
    return asked


def test_steps_alternate_after_warm_up(pretend):
    config = load_config(grpo.DEMO)
    made = grpo.run(config, repeats=3, seconds=60)
    assert pretend.workers == {"ocr": 2, "shapes": 1} and pretend.urls == [("http://127.0.0.1:1",)] * 2
    n = grpo.WARM_UPS + 3
    assert pretend.steps == [(chunks, i, i) for i in range(n) for chunks in (2, 1)]
    assert pretend.closed == [2, 1]
    assert config.rollout.chunks == 2 and config.rewards["ocr"].urls == ("http://127.0.0.1:8001",)  # the caller's is left alone
    data = json.loads(json.dumps(made.data))
    assert data["overlap"] == {"scoring_seconds": 0.5, "waited_seconds": 0.125, "hidden_share": 0.75}
    assert data["steps"] == len(data["all_steps"]["serial"]) == 3 and data["rollouts"] == 64
    assert data["service_request_seconds"] == {"ocr": 0.5, "shapes": 0.5}
    assert set(data["shares"]) == {"rollout", "decode", "reward", "update", "other"}
    assert "8 prompts x 8 rollouts of 32x64 pixels" in made.text and "75% is hidden" in made.text
    assert np.isfinite(data["serial_over_overlapped"]["median"])


def test_a_configuration_without_chunks_or_rewards_is_refused():
    with pytest.raises(BenchError, match="config.rollout.chunks=1 leaves nothing to overlap; set it to 2 or more"):
        grpo.run(load_config(grpo.DEMO, ["rollout.chunks=1"]), 1, 1)
    config = load_config(grpo.DEMO, ["rewards.ocr.weight=None", "rewards.shapes.weight=None"])
    with pytest.raises(BenchError, match="every weight is None"):
        grpo.run(config, 1, 1)


def test_services_start_and_end():
    with services.running({"shapes": 1}) as urls:
        assert set(urls) == {"shapes"} and urls["shapes"].startswith("http://127.0.0.1:")
        client = grpo.RewardClient("shapes", urls["shapes"])
        assert client.health()[0].workers == 1
    with pytest.raises(ValueError, match="no reward service answers"):
        client.health()
    client.close()


def test_a_service_that_does_not_start_is_named():
    with pytest.raises(BenchError, match="the service shapes did not start: .*--workers 0 must be at least 1"):
        with services.running({"shapes": 0}):
            pass
