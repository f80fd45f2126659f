"""Two real processes compared with one on the same mesh: equal batches, steps and files, and one reward request per image.

Then two processes of which one is stopped or killed.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import xomni_jax
from tests.processes.running import SLURM, TRAIN, config_file, ended, local
from tests.rl.pixel_service import pixel_service
from tests.training.test_stages import assert_same, metrics, params
from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import DataSection, batches

MEMBER = [sys.executable, "-m", "tests.processes.member"]
STEP = 16  # images of a step of GRPO: 4 prompts x 4 rollouts

# Configurations for `xomni train`.
TOLD = """
import json, os
from pathlib import Path
from tests.processes import member

folder, index = Path({folder!r}), int(os.environ["XOMNI_PROCESS"])
(folder / f"process_{{index}}").write_text(str(os.getpid()))

def get_config():
    plan = json.loads((folder / "plan.json").read_text())
    return member.grpo(folder, "grpo", plan["model"], plan["urls"][index])
"""
KILLED = """
import json, os, signal, time
from pathlib import Path
from tests.processes import member
from xomni_jax.training.metrics import MetricWriter

folder, write = Path({folder!r}), MetricWriter.write

def killed(self, step, scalars):
    write(self, step, scalars)
    while step == 3 and not (folder / "sft" / "checkpoints" / "2").is_dir():
        time.sleep(0.01)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("XOMNI_PROCESS") == "1" and not (folder / "again").exists():
    MetricWriter.write = killed

def get_config():
    return member.sft(folder, "sft", json.loads((folder / "plan.json").read_text())["model"])
"""


class Session(NamedTuple):
    """One start of one or two processes."""

    code: int
    told: str
    asked: tuple[list, list]  # images that the service of each process was given
    steps: dict  # stage -> the steps it has logged by then


def session(folder, model, *command, processes=2, tells=False):
    """Runs a command with a reward service for each process.

    With `tells` process 1 gets SIGTERM once both wait for the second step's rewards.
    """
    asked, both_wait, over = ([], []), threading.Barrier(2), threading.Event()

    def before(call):
        if tells and call == 2:
            if both_wait.wait(600) == 0:
                os.kill(int((folder / "process_1").read_text()), signal.SIGTERM)
            over.wait(600)

    with pixel_service(before=before) as a, pixel_service(before=before) as b:
        a.heard, b.heard = asked[0].extend, asked[1].extend
        (folder / "plan.json").write_text(json.dumps({"model": str(model), "urls": [a.url, b.url]}))
        try:
            process = local(*command, processes=processes, devices=4 // processes)
            told = ended(process)
        finally:
            over.set()
    steps = {stage: [line["step"] for line in metrics(folder / stage)] for stage in ("sft", "grpo") if (folder / stage).is_dir()}
    return Session(process.returncode, told, asked, steps)


def taken_along(run, target):
    """A run as far as its checkpoints go, in another folder."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("model", "config.json", "tensorboard"))


class Runs(NamedTuple):
    """Folders by name, and sessions: `told` and `killed` are interrupted, `one` and `rest` resume them; `two` is not interrupted."""

    root: Path
    sessions: dict


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir):
    """Everything that needs processes, in five starts."""
    root, done = tmp_path_factory.mktemp("processes"), {}
    told, killed, one, two = (root / name for name in ("told", "killed", "one", "two"))
    for folder in (told, killed, one, two):
        folder.mkdir()
    done["told"] = session(told, model_dir, *TRAIN, config_file(told, TOLD.format(folder=str(told))), tells=True)
    taken_along(told / "grpo", one / "grpo")
    done["one"] = session(one, model_dir, *MEMBER, str(one), processes=1)
    taken_along(one / "sft", two / "moved")
    shutil.rmtree(two / "moved" / "checkpoints" / "3")
    done["two"] = session(two, model_dir, *MEMBER, str(two))
    command = [*TRAIN, config_file(killed, KILLED.format(folder=str(killed)))]
    done["killed"] = session(killed, model_dir, *command)
    (killed / "again").touch()
    done["rest"] = session(killed, model_dir, *SLURM, *command, "--distributed")
    return Runs(root, done)


@pytest.mark.parametrize("name", ["one", "two", "rest"])
def test_runs_end_well(name, runs):
    assert runs.sessions[name].code == 0, runs.sessions[name].told


def found(runs, name, index=0):
    """What a process wrote down."""
    return json.loads((runs.root / name / f"out_{index}.json").read_text())


def test_the_log_says_which_start_was_chosen(runs):
    assert found(runs, "one")["description"] == "one process, 4 cpu devices"
    assert [found(runs, "two", i)["description"] for i in (0, 1)] == [f"process {i} of 2, 2 of 4 cpu devices" for i in (0, 1)]
    told = runs.sessions["two"].told
    assert "[1] sft: process 1 of 2, 2 of 4 cpu devices, mesh" in told and "all 2 processes ended well" in told
    # What concerns the run is said once.
    for once in ("finished: model in", "weights:", "mm_embed/table 576x32 float32 P('tensor', 'fsdp') 18.4 KB a device"):
        assert once in told and "[1] " + once not in told


def test_values_of_all_processes(runs):
    for index in (0, 1):
        assert found(runs, "two", index)["values"] == [{"a": ["x" * 3000, 0]}, {"a": ["x" * 3000, 1]}]


@pytest.mark.parametrize(
    "mesh, rows, owned",
    [
        ("fsdp", [[0, 1, 2, 3], [4, 5, 6, 7]], None),
        ("fsdp and tensor", [[0, 1, 2, 3], [4, 5, 6, 7]], None),
        ("interleaved", [[0, 1, 4, 5], [2, 3, 6, 7]], None),
        # Both processes hold all rows; the first answers for them.
        ("tensor across processes", [list(range(8))] * 2, [list(range(8)), []]),
    ],
)
def test_batches_are_those_of_one_process(runs, mesh, rows, owned):
    """Every row is loaded by the processes whose devices hold it and owned by one of them; the global array is the batch in order."""
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    ids = next(iter(batches(DataSection("rendered", RenderedConfig()), 5, 8, prefetch=0)))["id"]
    assert len(set(ids)) == 8
    for index in (0, 1):
        out = found(runs, "two", index)["meshes"][mesh]
        assert out["rows"] == rows[index] and out["owned"] == (owned or rows)[index]
        assert out["here"] == whole[rows[index]].tolist() and out["whole"] == whole.tolist() and out["sum"] == (whole**2).sum()
        assert out["shared"] == ids


def alike(one, two, rtol=2e-5):
    """Logged metrics of two runs; sums over devices may differ in their order."""
    assert [line.keys() for line in one] == [line.keys() for line in two] and one
    for a, b in zip(one, two):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=2e-6, err_msg=f"{name} of step {a['step']}")


@pytest.mark.parametrize("stage", ["sft", "grpo", "apart"])
def test_steps_are_those_of_one_process(stage, runs):
    """The first step of GRPO was made by two in both."""
    one, two = runs.root / "one" / stage, runs.root / "two" / stage
    alike(metrics(one), metrics(two))
    ours, theirs = params(one, "transformer"), params(two, "transformer")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)
    described = [json.loads((path / "model" / "model.json").read_text()) for path in (one, two)]
    assert described[0] == described[1]


def test_every_image_is_scored_once_and_by_its_own_process(runs):
    """Each of two asks its own service for its half of a step's images: in both steps of GRPO, and in the run with a decoder apart."""
    one, two = runs.sessions["one"].asked, runs.sessions["two"].asked
    assert len(one[0]) == 3 * STEP and not one[1]
    assert [len(seen) for seen in two] == [2 * STEP] * 2
    second = two[0][STEP // 2 : STEP] + two[1][STEP // 2 : STEP]
    assert sorted(one[0][:STEP]) == sorted(second) and len(set(second)) >= STEP // 2


def test_no_process_holds_whole_parameters(runs):
    """Four devices, two to a process: each holds a quarter of a kernel."""
    for index in (0, 1):
        size, parts = found(runs, "two", index)["kernel"]
        assert parts == [size // 4] * 2


def test_a_decoder_on_devices_of_its_own(runs):
    lines = metrics(runs.root / "two" / "apart")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 <= line["grpo/logp_gap_max"] < 1e-4 and line["reward/masked_frac"] == 0 for line in lines)


def test_a_checkpoint_of_one_process_is_continued_by_two(runs):
    moved, alone = runs.root / "two" / "moved", runs.root / "two" / "sft"
    assert f"resuming {moved} after step 2" in runs.sessions["two"].told
    alike(metrics(moved), metrics(alone))


def test_a_checkpoint_of_two_processes_is_continued_by_one(runs):
    """What came of it is compared above."""
    assert f"resuming {runs.root / 'one' / 'grpo'} after step 1" in runs.sessions["one"].told


def test_what_two_processes_wrote_one_reads(runs, model_dir):
    """A component, and the model directory of a whole run."""
    ours, theirs = (xomni_jax.load(path).params("siglip_vq") for path in (runs.root / "two" / "copy", model_dir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert params(runs.root / "two" / "sft", "mmdit").keys() == params(runs.root / "one" / "sft", "mmdit").keys()


def test_one_file_of_metrics_and_one_folder_of_events(runs):
    for stage in ("sft", "grpo"):
        folder = runs.root / "two" / stage
        assert len(list((folder / "tensorboard").iterdir())) == 1 and not list(folder.rglob("*.part"))
    assert sorted(p.name for p in (runs.root / "two" / "grpo" / "images").glob("*.png")) == ["step_000000.png", "step_000002.png"]


# ---- stopped and killed ----
def test_a_signal_to_one_ends_the_waits_of_both_and_both_save_the_same_step(runs):
    code, told, asked, steps = runs.sessions["told"]
    assert code == 0, told
    assert "[1] SIGTERM: saving at the end of this step" in told and "[0] SIGTERM" not in told
    assert f"[0] stopped after step 1 of 2, saved in {runs.root / 'told' / 'grpo' / 'checkpoints'}" in told
    assert steps["grpo"] == [1] and asked == tuple(seen[:STEP] for seen in runs.sessions["two"].asked)
    checkpoints = RunCheckpoints(runs.root / "told" / "grpo" / "checkpoints")
    assert checkpoints.manager.all_steps() == [1]
    checkpoints.close()


def test_when_one_is_killed_the_other_says_so_and_ends(runs):
    code, told, _, steps = runs.sessions["killed"]
    assert code == 128 + signal.SIGKILL, told
    assert steps["sft"][:2] == [1, 2]
    assert "process 1 was ended by SIGKILL; ending the others" in told
    assert "[0] xomni: process 1 is gone; process 0 ends too. The same command resumes from the newest checkpoint" in told
    assert "Traceback" not in told


def test_a_killed_run_goes_on_bit_for_bit(runs):
    """The restarted run, whose processes find each other by Slurm's variables alone, against the one that nothing happened to."""
    told = runs.sessions["rest"].told
    assert all(
        f"[{i}] waiting up to 120 s for the other processes" in told and f"[{i}] sft: process {i} of 2, 2 of 4 cpu devices" in told
        for i in (0, 1)
    )
    broken, straight = runs.root / "killed" / "sft", runs.root / "two" / "sft"
    assert f"resuming {broken} after step 2" in told
    assert metrics(broken) == metrics(straight) and [line["step"] for line in metrics(straight)] == [1, 2, 3]
    assert_same(params(broken, "transformer"), params(straight, "transformer"))
