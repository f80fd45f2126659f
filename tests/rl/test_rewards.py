"""The rewards section of a configuration: what is refused before any step."""

import pytest

from tests.rl.pixel_service import pixel_service
from xomni_jax.rl.rewards import close_all, open_clients


def test_only_weighted_rewards_are_asked():
    with pixel_service("ocr") as a, pixel_service("taste") as b:
        section = {
            "ocr": {"urls": (a.url,), "weight": 1},
            "taste": {"urls": (b.url,), "weight": 0.0},
            "shapes": {"urls": ("http://127.0.0.1:1",)},
        }
        clients, weights = open_clients(section, lambda: None)
        close_all(clients)
    assert weights == {"ocr": 1.0, "taste": 0.0} and set(clients) == {"ocr", "taste"}


@pytest.mark.parametrize(
    "section, words",
    [
        ({"ocr": {"urls": ("http://127.0.0.1:1",)}}, "the weights are all None; give at least one"),
        ({"ocr": {"urls": ("http://127.0.0.1:1",), "weight": 0.0}}, "the weights {'ocr': 0.0}; give at least one"),
        ({"ocr": {"urls": ("http://127.0.0.1:1",), "weight": float("inf")}}, "the weights {'ocr': inf}"),
        ({"ocr": {"weight": 1.0}}, "reward 'ocr' has no URL"),
        ({"ocr": {"urls": ("http://127.0.0.1:1",), "weight": 1.0}}, "no reward service answers at http://127.0.0.1:1"),
        ({"ocr": {"urls": ("http://127.0.0.1:1",), "wieght": 1.0}}, "config.rewards.ocr.wieght: unknown key"),
    ],
)
def test_nonsense_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        open_clients(section, lambda: None)
