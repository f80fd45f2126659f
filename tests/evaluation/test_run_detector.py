"""GenEval through the whole command with its own judge: the detector's service around small random models (parity marker: torch)."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.rewards.running import service
from tests.rewards.test_detector import folders  # noqa: F401 - a fixture
from xomni_jax.cli.main import main
from xomni_jax.evaluation import outputs
from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suites import geneval
from xomni_jax.rewards.scorer import build_scorer
from xomni_jax.sharding.mesh import make_mesh

pytest.importorskip("torch")
pytestmark = pytest.mark.parity
ROWS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "exclude": [{"class": "bus", "count": 9}],
        "prompt": "a photo of a cat left of a dog",
    },
]


def test_from_prompts_to_page(folders, model_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(outputs, "make_mesh", lambda axes: make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(geneval, "_CONFIDENCE", 0.0)  # untrained models are sure of nothing
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out"
    with service("detector", "--detector", folders[0], "--clip", folders[1], "--workers", "1", "--short-side", "64") as (_, url):
        paths = ["--model", str(model_dir), "--data", str(tmp_path), "--out", str(out), "--judge", url]
        assert main(["eval", "geneval", *paths, "--height", "16", "--width", "32", "--batch", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {out / 'results.json'}"
    for n, row in enumerate(ROWS):  # the official folders
        folder = out / "images" / f"{n:05d}"
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        assert files == ["metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4))]
        assert [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] == [row]
    results, items = json.loads((out / "results.json").read_text()), [json.loads(x) for x in (out / "items.jsonl").read_text().splitlines()]
    scorer = build_scorer("detector", {"detector": folders[0], "clip": folders[1], "short_side": 64})
    means = []
    for item, row in zip(items, ROWS, strict=True):
        (asked,) = geneval.GenEval().questions(Item("", "", {"metadata": row}))
        images = [np.asarray(Image.open(out / name).convert("RGB")) for name in item["images"]]
        seen = [scorer.score_image(image, {"prompt": "", "targets": {"detect": asked}}).detail["detections"] for image in images]
        assert item["replies"] == [[found] for found in seen] and any(any(found.values()) for found in seen)
        means.append(np.mean([geneval.judge(row, found)[0] for found in seen]))
        assert item["score"] == means[-1]
    assert (
        results["headline"]["name"] == "overall"
        and results["headline"]["value"] == pytest.approx(np.mean(means))
        and results["counts"]["outputs"] == 12
    )
    assert set(results["categories"]) == {"single_object", "colors", "position"}
    assert results["judge"]["name"] == "detector" and "Mask2Former" in results["judge"]["settings"]["official judge"]
    page = (out / "report.html").read_text()
    assert all(row["prompt"] in page for row in ROWS)
