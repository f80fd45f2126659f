"""A scorer in a user's own file, the one of xomni_jax/rewards/README.md: served by worker processes, asked by the trainer's client."""

import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.miniature import ROOT
from tests.rewards.images import sign
from tests.rewards.running import command, service
from tests.test_readme import commands, parse
from xomni_jax.rewards import Score
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rl.rewards import Rewards
from xomni_jax.training.stage import load_config

FILE = Path(__file__).with_name("my_scorer.py")
README = ROOT / "xomni_jax/rewards/README.md"
STARTS = "class Mine(Scorer):\n    name = 'mine'\n    def __init__(self, **options):\n"
ASKED = {"prompt": "a sign", "targets": {"sharp": True}}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The scorer runs from a folder outside the package."""
    file = tmp_path_factory.mktemp("mine") / FILE.name
    file.write_text(FILE.read_text())
    with service(f"{file}:Sharpness", "--step", "40", "--wanted", "0.25", "--workers", "2") as (_, url):
        yield url


def expected(image):
    """The score under the options of the service."""
    edges = (np.abs(np.diff(image.mean(-1), axis=1)) > 40).mean()
    return Score(min(edges / 0.25, 1.0), None, {"edges": edges})


def test_the_readme_shows_this_file_and_it_is_short():
    text = FILE.read_text()
    assert f"```python\n{text}```" in README.read_text() and len(text.splitlines()) < 40


@pytest.mark.parametrize("line", commands(README.read_text()))
def test_the_commands_of_the_readme_parse(line, monkeypatch):
    monkeypatch.chdir(FILE.parent)
    parse(line, monkeypatch)


def test_the_client_gets_what_the_file_computes(url):
    images = [sign("HELLO"), sign("OPEN", 48, 96), np.full((16, 16, 3), 90, np.uint8)] * 8
    with RewardClient("sharpness", url, chunk=7) as client:
        assert client.score(images, [ASKED] * 24) == [expected(image) for image in images]
        absent, broken = client.score([images[0], b"no image"], [{"prompt": "", "targets": {}}, ASKED])
        assert absent == Score(None) and not absent.applies
        assert broken.failed and "cannot be read" in broken.error
        (health,) = client.health()
    assert (health.scorer, health.version, health.workers, health.scored, health.not_applicable) == ("sharpness", "1", 2, 24, 1)


def test_any_language_can_ask_it(url):
    """JSON by hand, as in the README's curl command."""
    import base64

    from xomni_jax.rewards.protocol import encode_image

    image = sign("HELLO")
    body = {"schema": 1, "id": "a", "images": [base64.b64encode(encode_image(image)).decode()], "items": [ASKED]}
    answer = httpx.post(url + "/score", json=body, trust_env=False)
    assert answer.status_code == 200 and answer.json()["scores"] == [pytest.approx(expected(image).value)]


def test_a_run_names_it_in_its_rewards(url):
    """config.rewards takes any name; the trainer's clients are those of the services named there."""
    weighted = (
        f"rewards.sharpness.urls=('{url}',)",
        "rewards.sharpness.weight=0.5",
        "rewards.ocr.weight=None",
        "rewards.shapes.weight=None",
    )
    rewards = Rewards.open(load_config(ROOT / "configs/tiny/grpo.py", weighted).rewards, lambda: None)
    try:
        assert rewards.weights == {"sharpness": 0.5}
        assert rewards.clients["sharpness"].score([sign("HELLO")], [ASKED]) == [expected(sign("HELLO"))]
    finally:
        rewards.close()


@pytest.mark.parametrize(
    "source, words",
    [
        (f"{STARTS}        raise RuntimeError('no model')\n", "cannot start: RuntimeError: no model"),
        (f"class Own(Exception):\n    pass\n{STARTS}        raise Own('no model')\n", "cannot start: Own: no model"),
        ("import no_such_package\n", "no_such_package"),
        ("class Other(Scorer):\n    name = 'other'\n", "defines no 'Mine'; it defines Other"),
        ("class Mine(Scorer):\n    pass\n", "is not a scorer; derive the class from xomni_jax.rewards.Scorer and set its name"),
    ],
    ids=["start fails", "own exception", "missing package", "other name", "nameless"],
)
def test_a_file_that_does_not_work_is_refused_in_one_sentence(source, words, tmp_path):
    file = tmp_path / "my_scorer.py"
    file.write_text("from xomni_jax.rewards import Scorer\n" + source)
    done = subprocess.run(command(f"{file}:Mine", "--port", "0", "--workers", "1"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert words in done.stderr
