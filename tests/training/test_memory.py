"""What nobody holds is freed: a stage with its state, and a planner with its programs."""

import gc
import weakref

import jax
import pytest

from tests import kept_programs
from tests.miniature import stage_config
from tests.planner import narrow
from tests.rl.pixel_service import pixel_service
from xomni_jax.core.preemption import StopSignal
from xomni_jax.planner import chips, plan
from xomni_jax.training.stage import STAGES, policy_mesh


def live():
    """Bytes of all arrays on devices."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def one_step(config):
    """A stage made, stepped once and closed -> weak references to it."""
    mesh = policy_mesh(config)
    with jax.set_mesh(mesh):
        stage = STAGES.get(config.stage).make(config, mesh, StopSignal())
        assert live() > 0
        state, _ = stage.step(stage.state, next(stage.batches), 0)
        if stage.grid is not None:
            stage.grid(state, 1)
        stage.close()
        return weakref.ref(stage), weakref.ref(state)


@pytest.mark.parametrize("file", ["sft", "grpo"])
def test_a_stage(file, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = live()
    with pixel_service() as service:
        more = [f"init_from={model_dir}"]
        if file == "grpo":
            more += [f"rewards.ocr.urls=('{service.url}',)", "rewards.shapes.weight=None"]
        references = one_step(stage_config(file, tmp_path / "run", *more))
    assert live() == before
    assert [r() for r in references] == [None, None]


def test_a_planner():
    made = plan.programs_on(narrow.sft(), chips.parse("cpu:4"))
    program = weakref.ref(made["sft-update"].fn)
    made["sft-update"].fn.trace(*made["sft-update"].args)
    del made
    kept_programs.forget()
    gc.collect()
    assert program() is None
