"""One service for all tests of this folder: two names of one miniature model, and a reward."""

import pytest

from tests.serving.running import served
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards import Score


class Darkest:
    """A reward client that likes dark images, and does not know the third."""

    def score(self, images, items):
        assert items[0] == {"prompt": 'a sign "AB"', "targets": {"text": ["AB"]}, "group": "1"}
        return [Score(-float(x.mean())) if i != 2 else Score(None, "lost") for i, x in enumerate(images)]


@pytest.fixture(scope="session")
def model(model_dir):
    return XOmni(model_dir)


@pytest.fixture(scope="session")
def running(model):
    """(state, URL)."""
    with served({"sft": model, "rl": model}, {"dark": Darkest()}) as running:
        yield running
