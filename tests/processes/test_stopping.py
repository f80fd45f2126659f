"""Two processes are told to stop, and killed; the run goes on bit for bit. What keeps them from starting is one sentence."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.miniature import ROOT
from tests.processes.running import TRAIN, config_file, ended, environment, local
from tests.training.pixel_service import pixel_service
from tests.training.test_stages import assert_same, metrics, params

# Both processes write down their number in the system, for the signals of the test.
GRPO = """
import os
from pathlib import Path
from tests.processes import member

folder = Path({folder!r})
(folder / f"pid_{{os.environ['XOMNI_PROCESS']}}").write_text(str(os.getpid()))

def get_config():
    return member.grpo(folder, "run", {model!r}, {url!r}, "steps=3", "grid_every=0", "rollout.chunks=1", f"optimizer.learning_rate={rate}")
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory, model_dir):
    """One run in three sessions (SIGTERM to one process in a wait for rewards, one killed, the rest) beside an uninterrupted one."""
    root = tmp_path_factory.mktemp("stopping")
    sessions = {}
    with pixel_service() as service:
        hooks = {}
        service.before = lambda call: hooks.pop(call, lambda: None)()

        def session(name, folder):
            config = config_file(folder, GRPO.format(folder=str(folder), model=str(model_dir), url=service.url, rate="0.01"))
            process = local(*TRAIN, config)
            told = ended(process)
            sessions[name] = (process.returncode, told, metrics(root / folder / "run"))

        def send(number, folder):
            return lambda: os.kill(int((folder / "pid_1").read_text()), number)

        straight, broken = root / "straight", root / "broken"
        straight.mkdir(), broken.mkdir()
        session("straight", straight)
        # Two requests a step: the third is in the second step.
        hooks[service.calls + 3] = send(signal.SIGTERM, broken)
        session("told", broken)
        hooks[service.calls + 1] = send(signal.SIGKILL, broken)
        session("killed", broken)
        session("rest", broken)
    return sessions, straight / "run", broken / "run"


def test_a_signal_to_one_stops_both_at_the_same_step(story):
    code, told, lines = story[0]["told"]
    assert code == 0, told
    assert "[1] SIGTERM: saving at the end of this step" in told
    stopped = [line for line in told.splitlines() if "stopped after step" in line]
    # The second step was given up in its wait for rewards, or, had all rewards come already, made whole.
    assert len(stopped) == 1 and f"stopped after step {len(lines)} of 3" in stopped[0] and len(lines) in (1, 2)


def test_when_one_is_killed_the_other_says_so_and_ends(story):
    code, told, lines = story[0]["killed"]
    assert code == 128 + signal.SIGKILL, told
    assert "process 1 was ended by SIGKILL; ending the others" in told
    assert "[0] xomni: process 1 is gone; process 0 ends too. The same command goes on from the newest checkpoint" in told
    assert f"after step {len(story[0]['told'][2])}" in told and len(lines) < 3


def test_the_run_is_the_uninterrupted_one_bit_for_bit(story):
    sessions, straight, broken = story
    assert sessions["straight"][0] == sessions["rest"][0] == 0, sessions["rest"][1]
    assert metrics(broken) == metrics(straight) and len(metrics(straight)) == 3
    assert_same(params(broken, "transformer"), params(straight, "transformer"))


def test_another_configuration_on_one_host_is_refused(tmp_path, model_dir):
    text = GRPO.format(folder=str(tmp_path), model=str(model_dir), url="http://127.0.0.1:9", rate="0.0{int(os.environ['XOMNI_PROCESS']) + 1}")
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


def test_more_hosts_than_given(tmp_path, model_dir):
    """A configuration for four devices a process, started with one."""
    process = local(*TRAIN, config_file(tmp_path, GRPO.format(folder=str(tmp_path), model=str(model_dir), url="http://127.0.0.1:9", rate="0.01")), devices=1)
    told = ended(process)
    assert process.returncode == 2, told
    assert "mesh fsdp=2 x tensor=2 needs 4 devices, 2 are present; that is 2 hosts with 1 each; start it on 4 hosts, or change config.mesh" in told
    assert not (tmp_path / "run").exists()
