"""Joining the processes of a Slurm job, and what the errors of JAX mean when a process does not answer."""

import socket
import sys

import jax
import orbax.checkpoint as ocp
import pytest

from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.checkpoint.store import CheckpointError
from xomni_jax.cli import train
from xomni_jax.core import process_group
from xomni_jax.core.distributed import explain_silence, start
from xomni_jax.core.process_group import ProcessGroupError

SLURM = dict(SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", SLURM_LOCALID="0")


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (dict(SLURM, SLURM_PROCID="0"), "1 of 2 processes joined within 1 s (0); missing: 1. Start the same command on every host"),
        (
            dict(SLURM, SLURM_PROCID="1"),
            "process 1 cannot reach process 0 at localhost:{port} within 1 s (Connection refused); start all processes",
        ),
    ],
)
def test_the_other_process_does_not_join(variables, sentence, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (variables | dict(JAX_COORDINATOR_PORT=str(port - 1), XOMNI_START_TIMEOUT="1")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessGroupError) as error:
        start({}, distributed=True)
    assert str(error.value).startswith(sentence.format(port=port))


# As jax 0.10 and jaxlib's gloo word them.
NOBODY = (
    "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/{devices}/1 and duration: "
    "29.99999995s [type.googleapis.com/tensorflow.CoordinationServiceError='']"
)
SLOW = (
    "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/unbound_buffer.cc:132] Timed out waiting 4000ms for send operation "
    "to complete"
)
UNREACHED = "UNKNOWN: Gloo context initialization failed: [external/gloo/gloo/transport/tcp/pair.h:311] Connect timeout [none]"
CLOSED = "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5542"
BARRIER = (
    "DEADLINE_EXCEEDED: Barrier timed out. Id: hm::0. This usually happens because a task triggered the barrier too early or too slowly. "
    "Please look at the task logs (both timed out and first task) to debug further.\n# of tasks that reached the barrier: 1/2.\n"
    "The first task at the barrier: 0. Some timed out task names:\n1\n\n\n"
    "RPC: /xla.coordination.CoordinationService/Barrier [type.googleapis.com/tensorflow.CoordinationServiceError='']"
)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (NOBODY.format(devices="0,2"), "process 0 did not answer within 30 s: it has ended, hangs, or gets too little processor time"),
        (SLOW, "another process did not answer within 4 s: "),
        (UNREACHED, "another process did not answer: "),
        (CLOSED, "another process has closed its connection: it has ended"),
        (BARRIER, "process 1 did not answer: "),
    ],
)
def test_who_did_not_answer(text, sentence):
    told = explain_silence(jax.errors.JaxRuntimeError(text))
    assert told.startswith(sentence) and "The same command resumes from the newest checkpoint" in told and "\n" not in told


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), ValueError(SLOW), CheckpointError("damaged")]
)
def test_other_errors_are_left_alone(error):
    assert explain_silence(error) is None


def test_an_error_that_orbax_raised_because_of_it():
    try:
        try:
            raise jax.errors.JaxRuntimeError(BARRIER)
        except jax.errors.JaxRuntimeError as e:
            raise ValueError("Failed to save state") from e
    except ValueError as e:
        told = explain_silence(e)
    assert told.startswith("process 1 did not answer: ")


class Alone:
    """The group of a process whose error nobody hears."""

    def leave(self, error):
        self.error = error


def test_a_silent_process_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch, capsys):
    """The exchange fails where it does on a busy machine: inside Orbax, in the middle of a restore."""
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"x": jax.numpy.ones(2)}, {}, wait=True)

    def restore(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(NOBODY.format(devices="0,2"))

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    monkeypatch.setattr(process_group, "exit_now", sys.exit)
    group = Alone()
    with pytest.raises(SystemExit) as end:
        train.run_in_group(group, lambda: checkpoints.restore({"x": jax.ShapeDtypeStruct((2,), "float32")}))
    told = capsys.readouterr().err.strip()
    assert told.startswith("xomni train: process 0 did not answer within 30 s: ") and "\n" not in told and str(tmp_path) not in told
    assert end.value.code == 1 and told.endswith(group.error)
    checkpoints.close()
