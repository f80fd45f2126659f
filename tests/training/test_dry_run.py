"""xomni train --dry-run: what it says, and that nothing is written; --overfit N: which examples are learned."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cli.test_main import refusal
from tests.cli.test_train import SFT
from tests.data.test_sources import numbers  # noqa: F401 - a fixture
from xomni_jax.cli.main import main
from xomni_jax.core.config import ConfigError, Text
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import batches
from xomni_jax.sharding import abstract
from xomni_jax.training import run as training_run
from xomni_jax.training.dry_run import described, plan
from xomni_jax.training.pretrain import PretrainRun
from xomni_jax.training.stage import STAGES, RunningStage
from xomni_jax.training.state import TrainState


class Product:
    """A stage whose step is one product of matrices."""

    Config, components, closed = PretrainRun, (), 0

    @classmethod
    def programs(cls, cfg, models, mesh, decoder_mesh=None):
        args = (abstract.rows(mesh, (8, 4), jnp.float32), abstract.array(mesh, (4, 3), jnp.float32))
        part = Program(jax.jit(lambda x, y: x), args, "a part", Work(), per_step=0)
        return Programs(mesh, {"product": Program(jax.jit(lambda x, y: x @ y), args, "8 rows", Work(), per_step=2), "part": part}, {})

    @classmethod
    def make(cls, cfg, mesh, stop):
        state = TrainState(jnp.int32(0), {"norm": {"scale": jnp.ones((4, 3))}}, {}, {})
        batch = {"x": np.ones((8, 4), np.float32), "caption": ["a"] * 8}
        return RunningStage(state, iter([batch]), None, None, items_per_step=8, close=lambda: setattr(cls, "closed", cls.closed + 1))


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STAGES.shipped, "sft", "tests.training.test_dry_run:Product")
    monkeypatch.setattr("xomni_jax.training.run.STAGES", STAGES)
    run = tmp_path / "run"
    command = ["train", SFT, "--dry-run", "--config.steps=7", f"--config.run_dir={run}"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "  caption: 8, the first 'a'\n  x: float32 8x4\n" in told
    assert f"product: 8 rows; {2 * 8 * 4 * 3} operations, 2 times a step; a device holds arguments " in told
    assert f"a step: {2 * 2 * 8 * 4 * 3} operations, 8 examples" in told and "part" not in told and "curves" not in told
    assert f"it would go to step 7 in {run}, save 52 B every 200 steps" in told and told.endswith("dry run: nothing was written\n")
    assert list(tmp_path.iterdir()) == [] and sys.modules[Product.__module__].Product.closed == 1
    (run / "checkpoints" / "3").mkdir(parents=True)
    assert main(command) == 0
    assert "it would go on after step 3 to step 7" in capsys.readouterr().out
    (run / "checkpoints" / "3").rename(tmp_path / "3")
    monkeypatch.setattr("xomni_jax.core.folders.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert "0.0 MB are free, about 0.0 MB are needed" in refusal(capsys, *command)


def test_how_often_records_would_be_seen(numbers, tmp_path):  # noqa: F811
    cfg = dataclasses.replace(PretrainRun(), data=numbers, steps=30)
    assert list(plan(cfg, 4, 0))[1:] == ["it would see each of 10 records 12 times"]
    assert list(plan(dataclasses.replace(cfg, data=SIGNS), 4, 0))[1:] == []
    first = dataclasses.replace(numbers, first=3)
    assert list(plan(dataclasses.replace(cfg, data=first), 4, 0))[1:] == [
        "it would learn the first 3 examples of config.data again and again"
    ]


def test_every_part_of_a_batch_is_described():
    lines = list(described({"caption": ["a", "b"], "image": np.zeros((2, 4, 8, 3), np.uint8), "counts": {"left": 0.25}}))
    assert lines == ["caption: 2, the first 'a'", "counts/left: 0.25", "image: uint8 2x4x8x3"]


@pytest.mark.parametrize("first, batch_size, expected", [(3, 4, [0, 1, 2, 0]), (3, 2, [0, 1, 2, 2]), (1, 3, [0, 0, 0]), (99, 5, range(10))])
def test_the_first_examples_again_and_again(numbers, first, batch_size, expected):  # noqa: F811
    data = numbers.updated({"first": first}, "config.data")
    taken = [int(c) for _, batch in zip(range(2 * len(expected) // batch_size), batches(data, 5, batch_size)) for c in batch["caption"]]
    assert taken == [*expected, *expected][: len(taken)] and len(taken) >= len(expected)


def test_batches_of_the_first_examples_have_one_size():
    data = dataclasses.replace(SIGNS, first=10)
    taken = [batch for _, batch in zip(range(6), batches(data, 1, 4))]
    for batch, again in zip(taken[:3], taken[3:]):
        assert batch["id"] == again["id"] and batch["image"].ndim == 4
    ids = [i for batch in taken[:3] for i in batch["id"]]
    whole = [i for _, batch in zip(range(3), batches(SIGNS, 1, 4)) for i in batch["id"]]
    assert ids == [*whole[:10], *whole[8:10]]


def test_overfit_is_a_key_of_the_data(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(training_run, "run_stage", lambda config, **options: seen.append((config, options)))
    assert main(["train", SFT, "--overfit", "12", "--dry-run"]) == 0
    ((config, options),) = seen
    assert (config.data.first, config.data.as_dict()["first"], options) == (12, 12, {"dry_run": True})
    assert "first" not in SIGNS.as_dict()  # runs that were started without it go on
    assert "--overfit 0 must be at least 1" in refusal(capsys, "train", SFT, "--overfit=0")
    with pytest.raises(ConfigError, match="config.data.first=-1: expected int >= 0"):
        SIGNS.updated({"first": Text("-1")}, "config.data")
