"""Which process this one is, from a launcher's variables and in the jobs that are recognized."""

import http.server
import threading

import pytest

from xomni_jax.core.cluster import Membership, membership
from xomni_jax.core.process_group import ProcessGroupError

PREFIXES = ("JAX_COORDINATOR", "XOMNI_", "TPU_", "MEGASCALE_", "SLURM_", "OMPI_")
SLURM = {"SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "node[003-004,007],other1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "7",
}
GKE = {"TPU_WORKER_HOSTNAMES": "run-0-0.run,run-0-1.run", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "run-0-0.run:8080"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No job around the tests."""
    import os

    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")


def found(monkeypatch, variables, distributed=True):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return membership(distributed)


def test_one_process_needs_nothing(monkeypatch):
    assert found(monkeypatch, SLURM, distributed=False) is None


@pytest.mark.parametrize(
    "variables, expected",
    [
        (dict(JAX_COORDINATOR_ADDRESS="a:1", XOMNI_PROCESSES="3", XOMNI_PROCESS="2"), ("a:1", 3, 2)),
        (SLURM, ("node003:61445", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "node1,other2"}, ("node1:61445", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "alone"}, ("alone:61445", 4, 2)),
        (SLURM | {"JAX_COORDINATOR_PORT": "7000"}, ("node003:7000", 4, 2)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "front:7000"}, ("front:7000", 4, 2)),
        (OPEN_MPI, ("10.96.0.1:62715", 8, 7)),
        (GKE, ("run-0-0.run:8482", 2, 1)),
        (GKE | {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471,c:8471"}, ("a:8482", 3, 1)),
        (GKE | SLICES, ("run-0-0.run:8482", 4, 3)),
    ],
)
def test_the_job_is_recognized(variables, expected, monkeypatch):
    assert found(monkeypatch, variables) == Membership(*expected)


@pytest.mark.parametrize("variables", [GKE, GKE | SLICES, {"JAX_COORDINATOR_ADDRESS": "a:1"} | SLURM])
def test_variables_that_imply_several_processes(variables, monkeypatch):
    assert found(monkeypatch, variables, distributed=False).count > 1


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ({"worker-network-endpoints": "n0:1:10.0.0.5,n1:2:10.0.0.6", "tpu-env": "ZONE: 'a'"}, ("10.0.0.5:8482", 2, 1)),
        ({"worker-network-endpoints": "t-w0,t-w1", "tpu-env": ""}, ("t-w0:8482", 2, 1)),
        (
            {
                "worker-network-endpoints": "b0:1:10.0.1.5,b1:2:10.0.1.6",
                "tpu-env": "ZONE: 'a'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.5:8080'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
            },
            ("10.0.0.5:8482", 4, 3),
        ),
    ],
)
def test_a_tpu_vm_asks_its_metadata_server(attributes, expected, monkeypatch):
    attributes = attributes | {"agent-worker-number": "1"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 - the name that http.server calls
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[self.path.removeprefix("/computeMetadata/v1/instance/attributes/")].encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert found(monkeypatch, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}) == Membership(*expected)
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    "variables, told",
    [
        (dict(XOMNI_PROCESSES="2"), "JAX_COORDINATOR_ADDRESS is not set; a run of several processes needs"),
        (dict(XOMNI_PROCESSES="2", JAX_COORDINATOR_ADDRESS="a:1"), "XOMNI_PROCESS is not set"),
        (
            dict(XOMNI_PROCESSES="2", XOMNI_PROCESS="2", JAX_COORDINATOR_ADDRESS="a:1"),
            "XOMNI_PROCESS=2 of XOMNI_PROCESSES=2: .* from 0 to 1",
        ),
        (dict(XOMNI_PROCESSES="two", XOMNI_PROCESS="0", JAX_COORDINATOR_ADDRESS="a:1"), "XOMNI_PROCESSES='two' is not a number"),
        (dict(XOMNI_PROCESSES="2", XOMNI_PROCESS="0", JAX_COORDINATOR_ADDRESS="a"), "'a' is not the address of process 0; write host:port"),
        ({}, "this is not a job of several processes: neither a TPU slice nor Slurm nor Open MPI; leave --distributed out on one machine"),
    ],
)
def test_what_cannot_be_a_run_of_several_processes(variables, told, monkeypatch):
    with pytest.raises(ProcessGroupError, match=told):
        found(monkeypatch, variables)
