"""The recipes of .github/CONTRIBUTING.md: each file, taken as it stands there, is used by its path from the command line."""

import json
import re

import pytest

from tests.miniature import ROOT, SECTIONS
from tests.rewards.images import sign
from tests.rewards.running import service
from tests.rl.pixel_service import pixel_service
from xomni_jax.cli.main import main
from xomni_jax.rewards.client import RewardClient

TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
SMALL = ["--config.steps=1", "--config.log_every=1", "--config.grid_every=0"]


@pytest.fixture
def recipe(tmp_path):
    """Writes a file of the recipes into a folder of its own -> its path."""

    def write(name):
        (body,) = re.findall(rf"`{name}`:\n\n```python\n(.*?)```", TEXT, re.S)
        assert body.count("\n") < 40
        (tmp_path / name).write_text(body)
        return tmp_path / name

    return write


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_scorer(recipe, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = service(f"{recipe('my_scorer.py')}:Brightness", "--workers", "1")
    with started as (_, url), RewardClient("brightness", url) as client:
        image = sign("HELLO")
        (score,) = client.score([image], [{"prompt": "", "targets": {}}])
    assert score.value == pytest.approx(image.mean() / 255)


def test_a_data_source(recipe, model_dir, tmp_path):
    run, small = tmp_path / "run", [f"--config.transformer.{k}={v}" for k, v in SECTIONS["transformer"].items()]
    shapes = ["--config.data.sizes=((16,32),)", "--config.batch_size=8", "--config.next_token.rows=8", "--config.next_token.row_length=64"]
    source = [f"--config.data.source={recipe('my_source.py')}:Flags", f"--config.init_from={model_dir}", f"--config.run_dir={run}"]
    assert main(["train", f"--config={ROOT}/configs/tiny/pretrain_1.py", *source, *small, *shapes, *SMALL]) == 0
    assert last_line(run)["loss/image"] > 0
    assert json.loads((run / "config.json").read_text())["data"] == {"source": f"{tmp_path}/my_source.py:Flags", "sizes": [[16, 32]]}


def test_a_suite(recipe, model_dir, tmp_path):
    (tmp_path / "words.txt").write_text("CAT\nDOG\n")
    out = tmp_path / "out"
    where = ["--model", str(model_dir), "--data", str(tmp_path), "--out", str(out)]
    assert main(["eval", f"{recipe('my_suite.py')}:Words", *where, "--height", "16", "--width", "32", "--mesh", "data=1,fsdp=-1"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["title"] == "Signs of one word" and 0 <= results["headline"]["value"] <= 1


def test_a_training_method(recipe, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run = tmp_path / "run"
    method = [f"--config.stage={recipe('my_method.py')}:RankGRPO", f"--config.init_from={model_dir}", f"--config.run_dir={run}"]
    shapes = ["--config.data.sizes=((16,32),)", "--config.data.text_lengths=((2,3),)", "--config.grpo.rollouts_per_prompt=4"]
    mesh = ["--config.mesh.tensor=2", "--config.mesh.fsdp=4", "--config.rollout.chunks=2", "--config.decode.steps=1"]
    with pixel_service() as running:
        rewards = [f"--config.rewards.ocr.urls=('{running.url}',)", "--config.rewards.shapes.weight=None"]
        assert main(["train", f"--config={ROOT}/configs/tiny/demo.py", *method, *shapes, *mesh, *rewards, *SMALL]) == 0
    line = last_line(run)
    assert line["rank/tied"] < 1 and "grpo/flat_group_frac" not in line and line["grpo/logp_gap_max"] < 1e-4
