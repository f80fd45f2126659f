"""Whole commands in processes of their own: killed with -9, stopped with SIGTERM, cut in another number of shares, and the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.miniature import ROOT
from xomni_jax.evaluation.run_directory import RunDirectory

LIMIT = 48  # enough that a signal arrives while there is something left to do


def start(model, out, *more):
    """`xomni eval rendered-text` on one device."""
    command = [sys.executable, "-m", "xomni_jax.cli.main", "eval", "rendered-text", "--model", str(model), "--out", str(out), *more]
    command += ["--limit", str(LIMIT), "--batch", "4", "--height", "16", "--width", "32"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(out, kind, n, process):
    """Until n items are stored, or the process has ended."""
    while process.poll() is None and sum(path.read_text().count("\n") for path in (Path(out) / kind).glob("*.jsonl")) < n:
        time.sleep(0.01)


def finished(process):
    """Standard output of a command that must end well."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """One process, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert finished(start(model_dir, out)).splitlines()[-1] == f"results: {out / 'results.json'}"
    return out


def test_kills_stops_and_other_shares_change_nothing(whole, model_dir, tmp_path):
    killed = start(model_dir, tmp_path, "--shard", "2/2")
    wait_for_lines(tmp_path, "parts", 1, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    stopped = start(model_dir, tmp_path, "--shard", "1/1")
    wait_for_lines(tmp_path, "parts", len(RunDirectory(tmp_path).lines("parts")) + 1, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=600)
    assert stopped.returncode == 130 and said.rstrip().endswith("what is finished is kept, the same command goes on from there")
    before = RunDirectory(tmp_path).lines("parts")
    assert 2 <= len(before) < LIMIT
    two = [start(model_dir, tmp_path, "--shard", f"{k}/2") for k in (1, 2)]
    said = "".join(map(finished, two))
    assert said.count(f"results: {tmp_path / 'results.json'}") >= 1 and f"{LIMIT} of 96 items, {4 * LIMIT} outputs, each once" in said
    for name in ("results.json", "items.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    lines = [line for path in (tmp_path / "parts").glob("*.jsonl") for line in path.read_text().splitlines() if line.endswith("}")]
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) == LIMIT  # nothing was made twice
