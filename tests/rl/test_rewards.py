"""The rewards of a configuration: what is refused before any step."""

import dataclasses

import pytest

from configs.xomni import paths
from tests.miniature import ROOT
from tests.rl.pixel_service import pixel_service
from xomni_jax.rewards.scorer import scorer_class
from xomni_jax.rl.rewards import RewardConfig, Rewards, check_rewards
from xomni_jax.training.stage import load_config

NOBODY = ("http://127.0.0.1:1",)


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
    assert made.minimum == {"got_ocr": ("paddle_ocr",)} and made.weights["paddle_ocr"] == 0
