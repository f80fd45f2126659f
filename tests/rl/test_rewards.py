"""The rewards of a configuration: what is refused before any step."""

import pytest

from tests.rl.pixel_service import pixel_service
from xomni_jax.rl.rewards import RewardConfig, Rewards

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
