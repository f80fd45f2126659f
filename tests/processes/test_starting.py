"""What keeps several processes from starting is one sentence."""

import subprocess
import sys

import pytest

from tests.miniature import ROOT
from tests.processes.running import TRAIN, config_file, ended, environment, local

CONFIG = """
import os
from pathlib import Path
from tests.processes import member

def get_config():
    return member.sft(Path({folder!r}), "run", "/nowhere", f"optimizer.learning_rate={rate}")
"""


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
        (dict(XOMNI_PROCESS="0"), "1 of 2 processes joined within 1 s (0); missing: 1"),
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
    assert (
        "mesh fsdp=2 x tensor=2 needs 4 devices, 2 are present; that is 2 hosts with 1 each; start it on 4 hosts, or change config.mesh"
        in told
    )
    assert not (tmp_path / "run").exists()


SLOW = """
import time
import jax
from jax.experimental.multihost_utils import sync_global_devices
from xomni_jax.cli.train import run_in_group
from xomni_jax.core import distributed
from xomni_jax.sharding.mesh import make_mesh

group = distributed.start({})

def programme():
    distributed.connect(make_mesh(dict(fsdp=2, tensor=2)))
    if jax.process_index() == 1:
        time.sleep(600)
    sync_global_devices("late")

run_in_group(group, programme)
"""


def test_a_process_that_does_not_answer():
    """Real connections, over which nothing comes; half an hour's patience is made two seconds."""
    process = local(sys.executable, "-c", SLOW, XLA_FLAGS="--xla_cpu_collective_timeout_seconds=2")
    told = ended(process)
    assert process.returncode == 1, told
    sentence = "another process did not answer within 2 s: it has ended, hangs, or gets too little processor time"
    assert f"[0] xomni train: {sentence}" in told and f"[1] xomni: process 0 stopped: {sentence}" in told and "Traceback" not in told
