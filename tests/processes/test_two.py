"""Two real processes against one, on the same mesh: same batches, same steps, same files; rewards asked once a picture."""

import json
import shutil
import sys
import threading

import jax
import numpy as np
import pytest

import xomni_jax
from tests.processes.running import ended, local
from tests.training.pixel_service import pixel_service
from tests.training.test_stages import metrics, params
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import rendered_dataset


class Pictures:
    """A reward service that remembers what it was asked."""

    def __init__(self, service):
        self.url, self.seen, lock = service.url, [], threading.Lock()

        def heard(images):
            with lock:
                self.seen += images

        service.heard = heard


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir):
    """{"one", "two": folder of the same programme in one process and in two}, {"one", "two": what each service was asked}."""
    root, asked = tmp_path_factory.mktemp("processes"), {}
    for name, processes in (("one", 1), ("two", 2)):
        folder = root / name
        folder.mkdir()
        if name == "two":  # the first step of this run was made by one process
            shutil.copytree(root / "one" / "sft", folder / "moved", ignore=shutil.ignore_patterns("model", "config.json"))
            shutil.rmtree(folder / "moved" / "checkpoints" / "3")
        with pixel_service() as a, pixel_service() as b:
            services = [Pictures(a), Pictures(b)]
            plan = {"model": str(model_dir), "urls": [s.url for s in services]}
            (folder / "plan.json").write_text(json.dumps(plan))
            process = local(sys.executable, "-m", "tests.processes.member", str(folder), processes=processes, devices=4 // processes)
            told = ended(process)
            assert process.returncode == 0, told
            asked[name] = [s.seen for s in services]
        (folder / "told").write_text(told)
    return {name: root / name for name in asked}, asked


def found(runs, name, index=0):
    """What a process wrote down."""
    return json.loads((runs[0][name] / f"out_{index}.json").read_text())


def test_the_log_says_which_start_was_chosen(runs):
    assert found(runs, "one")["description"] == "one process, 4 cpu devices"
    assert [found(runs, "two", i)["description"] for i in (0, 1)] == [f"process {i} of 2, 2 of 4 cpu devices" for i in (0, 1)]
    told = (runs[0]["two"] / "told").read_text()
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
    """Every row is loaded by the processes whose devices hold it, owned by one of them, and the global array is the whole batch in order."""
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    ids = next(iter(rendered_dataset(RenderedConfig(), 5, 8, prefetch=0)))["id"]
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


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_steps_are_those_of_one_process(stage, runs):
    one, two = runs[0]["one"] / stage, runs[0]["two"] / stage
    alike(metrics(one), metrics(two))
    ours, theirs = params(one, "transformer"), params(two, "transformer")
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)
    described = [json.loads((path / "model" / "model.json").read_text()) for path in (one, two)]
    assert described[0] == described[1]


def test_every_picture_is_scored_once_and_by_its_own_process(runs):
    """Two steps of 4 prompts x 4 rollouts: 32 pictures; each process asks its own service for its half of them."""
    one, two = runs[1]["one"], runs[1]["two"]
    assert len(one[0]) == 32 and not one[1]
    assert [len(seen) for seen in two] == [16, 16]
    assert sorted(one[0]) == sorted(two[0] + two[1])


def test_no_process_holds_whole_parameters(runs):
    """Four devices, two to a process: each holds a quarter of a kernel."""
    for index in (0, 1):
        size, parts = found(runs, "two", index)["kernel"]
        assert parts == [size // 4] * 2


def test_a_checkpoint_of_one_process_is_continued_by_two(runs):
    moved, alone = runs[0]["two"] / "moved", runs[0]["two"] / "sft"
    assert f"resuming {moved} after step 2" in (runs[0]["two"] / "told").read_text()
    alike(metrics(moved), metrics(alone))


def test_what_two_processes_wrote_one_reads(runs, model_dir):
    """A component, and the model directory of a whole run."""
    ours, theirs = (xomni_jax.load(path).params("siglip_vq") for path in (runs[0]["two"] / "copy", model_dir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert params(runs[0]["two"] / "sft", "mmdit").keys() == params(runs[0]["one"] / "sft", "mmdit").keys()


def test_one_file_of_metrics_and_one_folder_of_events(runs):
    for stage in ("sft", "grpo"):
        folder = runs[0]["two"] / stage
        assert len(list((folder / "tensorboard").iterdir())) == 1 and not list(folder.rglob("*.part"))
    assert sorted(p.name for p in (runs[0]["two"] / "grpo" / "images").iterdir()) == ["step_000000.png", "step_000002.png"]
