"""`xomni rewards`: health and scores in one line each."""

import argparse

import pytest
from PIL import Image

from tests.rewards.fake_service import fake_service
from xomni_jax.cli import rewards


def run(*line):
    parser = argparse.ArgumentParser(prog="xomni")
    rewards.add_arguments(parser)
    return rewards.run(parser.parse_args(line), [])


def test_prints_health_and_scores(tmp_path, capsys):
    good, empty = tmp_path / "good.png", tmp_path / "other.png"
    for file in (good, empty):
        Image.new("RGB", (8, 8)).save(file)
    with fake_service("ok", "error", "null") as s:
        assert run(f"ocr={s.url}", "--image", str(good), "--text", "HI") == 0
        assert run(f"ocr={s.url}", "--image", str(good), "--text", "HI") == 1
        assert run(f"ocr={s.url}", "--image", str(empty)) == 0
    out = capsys.readouterr().out
    assert "good.png: 1.370" in out and "not scored: the image is empty" in out and "does not apply" in out and s.url in out


@pytest.mark.parametrize(
    "line, words",
    [
        (["ocr"], "is not NAME=URL"),
        (["ocr=http://127.0.0.1:1"], "xomni serve-reward ocr --port 1"),
        (["ocr=http://a", "--image", "absent.png"], "absent.png cannot be read"),
    ],
)
def test_errors_are_one_sentence(line, words):
    with pytest.raises(ValueError, match=words):
        run(*line)
