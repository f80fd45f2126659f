"""SIGTERM to one of two real processes in the middle of a rollout: both leave it after the same segment, and the step is made again."""

import json

import pytest

from tests.processes.running import TRAIN, config_file, ended, local
from tests.rl.pixel_service import pixel_service
from tests.training.test_stages import assert_same, metrics, params
from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints

CHECKS = 5  # of a step: between four segments, after the chunk, after its scores
STEP = 16  # images of a step: 4 prompts x 4 rollouts
# A configuration for `xomni train`. The signal comes in the second step, after two of its four segments; both processes wait there until it
# is agreed upon, so that the test does not depend on who is faster.
CONFIG = """
import json, os, signal, time
from pathlib import Path
from tests.processes import member
from xomni_jax.core.preemption import StopSignal

folder, index, check, seen = Path({folder!r}), int(os.environ["XOMNI_PROCESS"]), StopSignal.check, []

def told(self):
    seen.append(None)
    if len(seen) == {checks} + 2:
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        while not self._group.next_poll_stops():
            time.sleep(0.01)
    check(self)

if {tells}:
    StopSignal.check = told

def get_config():
    plan = json.loads((folder / "plan.json").read_text())
    return member.grpo(folder, "grpo", plan["model"], plan["urls"][index], "rollout.segment=2")
"""


def session(folder, model, tells=False):
    """Both processes once -> (exit code, output, images that were scored)."""
    scored = []
    with pixel_service() as a, pixel_service() as b:
        a.heard = b.heard = scored.extend
        (folder / "plan.json").write_text(json.dumps({"model": str(model), "urls": [a.url, b.url]}))
        config = config_file(folder, CONFIG.format(folder=str(folder), checks=CHECKS, tells=tells))
        process = local(*TRAIN, config, devices=2)
        told = ended(process)
    return process.returncode, told, len(scored)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model_dir):
    """A run told to stop in its second step: (folder, session)."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, session(folder, model_dir, tells=True)


def test_both_leave_the_rollout_after_the_same_segment(stopped):
    folder, (code, told, scored) = stopped
    assert code == 0, told
    assert "[1] SIGTERM: saving" in told and "[0] SIGTERM" not in told and "all 2 processes ended well" in told
    assert f"[0] stopped after step 1 of 2, saved in {folder / 'grpo' / 'checkpoints'}" in told
    # The second step had no images yet.
    assert scored == STEP and [line["step"] for line in metrics(folder / "grpo")] == [1]
    checkpoints = RunCheckpoints(folder / "grpo" / "checkpoints")
    assert checkpoints.manager.all_steps() == [1]
    checkpoints.close()


def test_the_run_goes_on_bit_for_bit(stopped, model_dir, tmp_path):
    folder = stopped[0]
    for where, images in ((folder, STEP), (tmp_path, 2 * STEP)):
        code, told, scored = session(where, model_dir)
        assert code == 0 and scored == images, told
    assert metrics(folder / "grpo") == metrics(tmp_path / "grpo")
    assert_same(params(folder / "grpo", "transformer"), params(tmp_path / "grpo", "transformer"))
