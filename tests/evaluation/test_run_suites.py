"""Complete runs of the shipped tiny model: signs read by PP-OCR, shapes by contours, questions; and real prompts where they are present."""

import json
import os
from pathlib import Path

import jax
import pytest

from xomni_jax.cli.main import main
from xomni_jax.evaluation import outputs
from xomni_jax.sharding.mesh import make_mesh

SHARED = Path(os.environ.get("XOMNI_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that tests simulate: one compiles faster, and is what the tiny model is for."""
    monkeypatch.setattr(outputs, "make_mesh", lambda axes: make_mesh({}, jax.devices()[:1]))


def results_of(out, capsys):
    """results.json and items of a run that has just ended."""
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {out / 'results.json'}"
    return json.loads((out / "results.json").read_text()), [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name, judge", [("rendered-text", "pp-ocr"), ("rendered-shapes", "contours")])
def test_images_are_drawn_judged_and_scored(name, judge, tmp_path, capsys):
    assert main(["eval", name, "--out", str(tmp_path), "--limit", "4"]) == 0
    results, items = results_of(tmp_path, capsys)
    assert results["judge"]["name"] == judge and results["counts"]["items"] == 4 and results["counts"]["outputs"] == 16
    assert 0 <= results["headline"]["value"] <= 1 and sum(c["items"] for c in results["categories"].values()) == 4
    for item in items:
        assert len(item["images"]) == len(item["replies"]) == len(item["verdicts"]) == 4 and 0 <= item["score"] <= 1
        assert all((tmp_path / image).is_file() for image in item["images"])
    assert any(any(reply) for item in items for reply in item["replies"])  # the judge saw something


def test_questions_are_answered_and_scored_apart(tmp_path, capsys):
    command = ["eval", "rendered-qa", "--out", str(tmp_path), "--limit", "6"]
    assert main([*command, "--phase", "score"]) == 2
    assert capsys.readouterr().err == f"xomni eval: rendered-qa: 6 of 6 items are not answered in {tmp_path}; run --phase answer\n"
    assert main([*command, "--phase", "answer"]) == 0
    done = f"rendered-qa: 6 of 6 items are answered in {tmp_path}; score them with the same command and --phase score"
    assert capsys.readouterr().out.splitlines()[-1] == done
    assert not (tmp_path / "results.json").exists()
    assert main([*command, "--phase", "score", "--model", "/no/model/is/needed"]) == 0
    results, items = results_of(tmp_path, capsys)
    assert results["headline"]["name"] == "exact match"
    assert results["headline"]["value"] == sum(item["record"]["right"] for item in items) / 6
    assert all(isinstance(item["answer"], str) for item in items) and results["judge"] is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published prompts are not here")
def test_published_prompts(tmp_path, capsys):
    """Longer than the tiny decoder's text encoder takes: drawn whole, decoded from their beginning, and counted."""
    assert main(["eval", "longtext-en", "--data", str(SHARED), "--out", str(tmp_path), "--limit", "2", "--batch", "4"]) == 0
    results, items = results_of(tmp_path, capsys)
    assert results["counts"]["overlong prompts"] == 2 and results["counts"]["published"] == 160
    assert [item["id"] for item in items] == ["0000", "0001"] and all(item["record"]["gt"] > 0 for item in items)
