"""The rewards of a configuration: what is refused before any step."""

import dataclasses
import json

import numpy as np
import pytest

from configs.xomni import paths
from tests.miniature import ROOT
from tests.rewards.fake_service import fake_service
from tests.rl.pixel_service import pixel_service
from xomni_jax.core.config import ConfigError
from xomni_jax.core.preemption import Outage
from xomni_jax.rewards import Score
from xomni_jax.rewards.combine import column, combine
from xomni_jax.rewards.protocol import Health
from xomni_jax.rewards.replicas import RewardServiceError
from xomni_jax.rewards.scorer import scorer_class
from xomni_jax.rl.monitors import crossings
from xomni_jax.rl.rewards import RewardConfig, Rewards, check_rewards
from xomni_jax.training.stage import load_config

NOBODY = ("http://127.0.0.1:1",)


def test_a_metric_that_leaves_its_range_is_said_once_and_when_it_comes_back():
    said, outside, watch = [], set(), (("a", 0.0, 1.0), ("b", 0.5, 2.0), ("absent", 0.0, 0.0))
    for a, b in ((0.5, 1.0), (2.0, 1.0), (3.0, 0.1), (0.0, 0.1)):
        said.append(list(crossings(watch, {"a": a, "b": b}, outside)))
    assert [len(lines) for lines in said] == [0, 1, 1, 1] and outside == {"b"}
    assert said[1] == ["warning: a is 2, outside of 0 to 1"] and said[3] == ["warning: a is 0, in its range again"]


def test_two_readers_count_as_the_one_that_reads_less():
    configs = {"a": RewardConfig(NOBODY, weight=2.0, scale=0.5), "b": RewardConfig(NOBODY, weight=0.0, minimum_with="a")}
    rewards = Rewards(check_rewards({**configs, "unused": RewardConfig()}), {})
    assert rewards.minimum == {"a": ("b",)} and rewards.asked({"a": 1.0}) == {"a", "b"} and rewards.asked({"c": 1.0}) == {"c"}
    scores = {"a": [Score(0.9), Score(0.2), Score(0.5), Score(0.5)], "b": [Score(0.4), Score(0.6), Score(None), Score(None, "no")]}
    columns = {name: column(own, 2) for name, own in scores.items()}
    for mode, factor in (("sum_then_normalize", 1.0), ("normalize_then_sum", 2.0)):
        weights = rewards.weights_of([rewards.weights] * 2, mode)
        total = combine(columns, weights, mode, minimum=rewards.minimum)
        np.testing.assert_allclose(total.total_PR[0], [0.4 * factor, 0.2 * factor])
        # Absent for a part of a group only is a failure, and a failure of the second reader is one of both.
        assert total.ok_PR.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("minimum_with, weight", [("absent", 0.0), ("a", 1.0)])
def test_a_combination_that_does_not_fit_is_refused(minimum_with, weight):
    with pytest.raises(ConfigError, match="name a reward with a weight, and give b the weight 0"):
        check_rewards({"a": RewardConfig(NOBODY, weight=1.0), "b": RewardConfig(NOBODY, weight=weight, minimum_with=minimum_with)})


@pytest.mark.parametrize(
    "scope, rows, chunks, fits",
    [
        ("image", [0, 2, 4, 6], 2, True),
        ("group", range(8), 2, True),
        ("group", [4, 5, 6, 7], 2, True),  # the second host's
        ("group", [2, 3, 4, 5], 2, False),
        ("group", [0, 2, 4, 6], 1, False),
        ("set", range(8), 1, True),
        ("set", range(8), 2, False),
        ("set", [0, 1, 2, 3], 1, False),
    ],
)
def test_what_is_compared_is_asked_about_together(scope, rows, chunks, fits):
    """Chunks of two prompts with four rollouts each."""
    about = Health(status="ok", schema=2, accepts=(), scorer="wins", scope=scope)
    rewards = Rewards({}, {}, about={"wins": about})
    if fits:
        return rewards.check_together(rows, 8, chunks, 4)
    with pytest.raises(ConfigError, match=r"config\.rewards\.wins compares (all images of a step|the 4 rollouts)"):
        rewards.check_together(rows, 8, chunks, 4)


def test_a_resumed_run_wants_the_same_versions(tmp_path):
    with fake_service("ok", version="2") as s:
        configs = {"ocr": RewardConfig((s.url,), weight=1.0, max_wait=0.2)}
        said = []
        rewards = Rewards.open(configs, lambda: None, tmp_path, said.append)
        rewards.close()
        assert "ocr" in said[-1] and rewards.record() == {"ocr": {"version": "2", "model_hash": ""}}
        (tmp_path / "rewards.json").write_text(json.dumps({"ocr": {"version": "1", "model_hash": ""}}))
        with pytest.raises(RewardServiceError, match="version 2, others were version 1"):
            Rewards.open(configs, lambda: None, tmp_path, said.append)
    with pytest.raises(Outage, match="no reward service answers"):  # a run that goes on waits, and is started again
        Rewards.open(configs, lambda: None, tmp_path, said.append)


def test_only_weighted_rewards_are_asked():
    with pixel_service("ocr") as a, pixel_service("taste") as b:
        configs = {"ocr": RewardConfig((a.url,), weight=1), "taste": RewardConfig((b.url,), weight=0.0), "shapes": RewardConfig(NOBODY)}
        rewards = Rewards.open(configs, lambda: None)
        rewards.close()
    assert rewards.weights == {"ocr": 1.0, "taste": 0.0} and set(rewards.clients) == {"ocr", "taste"}


@pytest.mark.parametrize(
    "reward, words",
    [
        (RewardConfig(NOBODY), "the weights are all None; give at least one"),
        (RewardConfig(NOBODY, weight=0.0), "the weights {'ocr': 0.0}; give at least one"),
        (RewardConfig((), weight=1.0), "config.rewards.ocr.urls is empty"),
        (RewardConfig(NOBODY, weight=1.0), "no reward service answers at http://127.0.0.1:1"),
    ],
)
def test_nonsense_is_refused(reward, words):
    with pytest.raises(ValueError, match=words):
        Rewards.open({"ocr": reward}, lambda: None)


def test_the_papers_rewards_are_named_in_one_place_and_say_how_to_start_them(monkeypatch):
    """Every missing service is refused with its own command; the two recognisers count as the lower one."""
    monkeypatch.setattr("configs.xomni.paths.REWARDS", {name: (NOBODY[0] + str(n),) for n, name in enumerate(paths.REWARDS)})
    asked = check_rewards(load_config(ROOT / "configs/xomni/grpo.py").rewards)
    assert set(asked) == set(paths.REWARDS) == {"hpsv2", "unified_reward", "alignment", "got_ocr", "paddle_ocr"}
    for name, config in asked.items():
        scorer_class(name)  # its packages are imported when it starts
        (url,) = paths.REWARDS[name]
        alone = {name: dataclasses.replace(config, weight=1.0, minimum_with="")}
        with pytest.raises(ValueError, match=f"no reward service answers at {url} .*xomni serve-reward {name} --port {url[-2:]}"):
            Rewards.open(alone, lambda: None)
    made = Rewards(asked, {})
    assert made.minimum == {"paddle_ocr": ("got_ocr",)} and made.weights["got_ocr"] == 0
