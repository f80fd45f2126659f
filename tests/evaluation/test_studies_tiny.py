"""The studies and the comparison on real runs of tiny models: drawn, read by PP-OCR, scored."""

import json

import pytest

from tests.evaluation.tiny_model import make_models
from xomni_jax.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of rendered-text by two untrained models: SFT with two seeds and with guidance, RL."""
    folder = tmp_path_factory.mktemp("studies")
    models = make_models(folder / "models")
    how = {
        "sft-1": ("sft", "--seed", "1234"),
        "sft-2": ("sft", "--seed", "1235"),
        "guided": ("sft", "--guidance", "2"),
        "rl": ("run/model", "--seed", "1234"),
    }
    for name, (model, *options) in how.items():
        command = ["eval", "rendered-text", "--model", str(models / model), "--limit", "3", "--out", str(folder / name), *options]
        assert main(command) == 0
    return folder


def results(run):
    """What a run left."""
    return json.loads((run / "results.json").read_text())


def test_best_of_n(runs, capsys):
    out = runs / "best"
    sft = [str(runs / "sft-1"), str(runs / "sft-2")]
    assert main(["eval", "best-of-n", "--sft", *sft, "--rl", str(runs / "rl"), "--out", str(out)]) == 0
    study = json.loads((out / "best_of_n.json").read_text())
    assert [row["n"] for row in study["rows"]] == [1, 2, 4, 8] and study["left_out"] == [16] and study["items"] == 3
    assert study["rl"]["headline"] == results(runs / "rl")["headline"]["value"]
    assert (out / "best_of_n.html").is_file() and (out / "best_of_n.csv").is_file() and "best_of_n.html" in capsys.readouterr().out


def test_guidance(runs):
    assert main(["eval", "guidance", str(runs / "sft-1"), str(runs / "guided"), "--out", str(runs / "guidance")]) == 0
    study = json.loads((runs / "guidance" / "guidance.json").read_text())
    headlines = [results(runs / name)["headline"]["value"] for name in ("sft-1", "guided")]
    assert [(row["guidance"], row["headline"]) for row in study["rows"]] == list(zip([1.0, 2.0], headlines))


def test_compare_and_report(runs, capsys):
    assert main(["compare", str(runs / "sft-1"), str(runs / "rl"), "--out", str(runs / "compared")]) == 0
    assert "model.sha256" in capsys.readouterr().out and (runs / "compared" / "compare.html").is_file()
    page, sha256 = (runs / "rl" / "report.html").read_text(), results(runs / "rl")["settings"]["model"]["sha256"]
    assert sha256 in page and page.count("data:image/png;base64,") == 3 * 4 and (runs / "rl" / "results.csv").is_file()
