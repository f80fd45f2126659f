"""Two processes are told to stop, and killed; the run goes on bit for bit. What keeps them from starting is one sentence."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.miniature import ROOT
from tests.processes import small
from tests.processes.running import TRAIN, config_file, ended, environment, local
from tests.training.test_stages import metrics

CONFIG = """
import os
from pathlib import Path
from tests.processes import member

def get_config():
    return member.sft(Path({folder!r}), "run", "/nowhere", f"optimizer.learning_rate={rate}")
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One run in three sessions (SIGTERM to one process while both wait, one process killed, the rest) beside an uninterrupted one."""
    root = tmp_path_factory.mktemp("stopping")
    sessions = {}

    def session(name, folder, order=""):
        (root / folder).mkdir(exist_ok=True)
        if order:
            (root / folder / "order").write_text(order)
        if order == "term":
            (root / folder / "waits").touch()
        process = local(sys.executable, "-m", "tests.processes.small", str(root / folder))
        told = ended(process)
        (root / folder / "waits").unlink(missing_ok=True)
        sessions[name] = (process.returncode, told, metrics(root / folder / "run"))

    session("straight", "straight")
    session("told", "broken", "term")
    session("killed", "broken", "kill")
    session("rest", "broken")
    return sessions, root / "straight" / "run", root / "broken" / "run"


def test_a_signal_to_one_ends_the_waits_of_both_and_both_save_the_same_step(story):
    code, told, lines = story[0]["told"]
    assert code == 0, told
    assert "[1] SIGTERM: saving at the end of this step" in told and "[0] SIGTERM" not in told
    assert f"[0] stopped after step {small.TERM_AT} of {small.STEPS}, saved in" in told
    assert [line["step"] for line in lines] == list(range(1, small.TERM_AT + 1))


def test_when_one_is_killed_the_other_says_so_and_ends(story):
    code, told, lines = story[0]["killed"]
    assert code == 128 + signal.SIGKILL, told
    assert f"after step {small.TERM_AT}" in told and lines[-1]["step"] == small.KILL_AT
    assert "process 1 was ended by SIGKILL; ending the others" in told
    assert "[0] xomni: process 1 is gone; process 0 ends too. The same command goes on from the newest checkpoint" in told
    assert "Traceback" not in told


def test_the_run_is_the_uninterrupted_one_bit_for_bit(story):
    sessions, straight, broken = story
    assert sessions["straight"][0] == sessions["rest"][0] == 0, sessions["rest"][1]
    assert metrics(broken) == metrics(straight) and len(metrics(straight)) == small.STEPS
    ours, theirs = (np.load(path / "model" / "w.npy") for path in (broken, straight))
    assert ours.tobytes() == theirs.tobytes() and not np.array_equal(ours, np.arange(128.0).reshape(8, 16) / 7)


def test_another_configuration_on_one_host_is_refused(tmp_path):
    text = CONFIG.format(folder=str(tmp_path), rate="0.0{int(os.environ['XOMNI_PROCESS']) + 1}")
    process = local(*TRAIN, config_file(tmp_path, text))
    told = ended(process)
    assert process.returncode == 2
    sentence = "process 1 was started with config.optimizer.learning_rate=0.02, process 0 with 0.01; start the same command on every host"
    for index in (0, 1):
        assert f"[{index}] xomni train: {sentence}" in told
    assert "Traceback" not in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (dict(XOMNI_PROCESS="1"), "process 1 cannot reach process 0 at 127.0.0.1:10 within 1 s (Connection refused)"),
        (dict(XOMNI_PROCESS="0"), "1 of 2 processes arrived within 1 s (0); missing: 1"),
    ],
)
def test_alone_where_two_were_announced(variables, sentence, tmp_path):
    address = "127.0.0.1:9" if variables["XOMNI_PROCESS"] == "1" else f"127.0.0.1:{free()}"
    env = environment() | variables | dict(XOMNI_PROCESSES="2", JAX_COORDINATOR_ADDRESS=address, XOMNI_START_TIMEOUT="1")
    command = [*TRAIN, f"--config={ROOT / 'configs' / 'tiny' / 'sft.py'}", f"--config.run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 2 and sentence in done.stderr and "\n" not in done.stderr.strip()
    assert not (tmp_path / "run").exists()


def free():
    """A port for the coordinator with a free one after it."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        from local import free_ports
    finally:
        sys.path.pop(0)
    return free_ports()


def test_more_hosts_than_given(tmp_path):
    """A configuration for four devices a process, started with one."""
    process = local(*TRAIN, config_file(tmp_path, CONFIG.format(folder=str(tmp_path), rate="0.01")), devices=1)
    told = ended(process)
    assert process.returncode == 2, told
    assert "mesh fsdp=2 x tensor=2 needs 4 devices, 2 are present; that is 2 hosts with 1 each; start it on 4 hosts, or change config.mesh" in told
    assert not (tmp_path / "run").exists()
