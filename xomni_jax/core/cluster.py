"""Which process of a run this one is. The environment says so, in this order:

    JAX_COORDINATOR_ADDRESS, XOMNI_PROCESSES, XOMNI_PROCESS   host:port of process 0, number of processes, index of this one
    --distributed, JAX_COORDINATOR_ADDRESS alone, or          the job that this process belongs to: Slurm, Open MPI, one or more TPU slices
    several TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES > 1
    none of these                                             one process

`jax.distributed.initialize` recognizes such jobs, too, but does not say what it found, and aborts if a process does not join.
"""

from __future__ import annotations

import os
import re
import urllib.request
from typing import NamedTuple

from xomni_jax.core.process_group import ProcessGroupError, split_address

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "XOMNI_PROCESSES", "XOMNI_PROCESS")


class Membership(NamedTuple):
    """The first three arguments of `jax.distributed.initialize`."""

    address: str  # "host:port" of process 0
    count: int
    index: int


def membership(distributed: bool = False) -> Membership | None:
    """This process among those of its run; None for a run of one process.

    Args:
      distributed: the user says that there are several processes.

    Raises:
      ProcessGroupError: the variables contradict each other, or there is no job of several processes.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    if given["XOMNI_PROCESSES"] or given["XOMNI_PROCESS"]:
        if unset := [name for name in VARIABLES if not given[name]]:
            raise ProcessGroupError(
                f"{unset[0]} is not set; a run of several processes needs {', '.join(VARIABLES)} (launch/local.py sets them)"
            )
        count, index = int(number("XOMNI_PROCESSES")), int(number("XOMNI_PROCESS"))
        if not 0 <= index < count:
            raise ProcessGroupError(f"XOMNI_PROCESS={index} of XOMNI_PROCESSES={count}: processes are numbered from 0 to {count - 1}")
        split_address(given["JAX_COORDINATOR_ADDRESS"])
        return Membership(given["JAX_COORDINATOR_ADDRESS"], count, index)
    several_hosts = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    if not (distributed or several_hosts or given["JAX_COORDINATOR_ADDRESS"]):
        return None
    found = slurm() or open_mpi() or tpu()
    if found is None:
        raise ProcessGroupError(
            "this is not a job of several processes: neither a TPU slice nor Slurm nor Open MPI; leave --distributed out on one machine, "
            f"or set {', '.join(VARIABLES)}"
        )
    return found._replace(address=given["JAX_COORDINATOR_ADDRESS"] or found.address)


def slurm() -> Membership | None:
    """A step of Slurm (srun). Its nodes are listed as "node1,other2" or "node[001-004,007],other2"; the first one has process 0."""
    env = os.environ
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"} <= env.keys():
        return None
    name, digits = re.match(r"([^,\[]+)(?:\[(\w+))?", env["SLURM_STEP_NODELIST"]).groups(default="")
    return Membership(f"{name}{digits}:{port_of_job(env['SLURM_JOB_ID'])}", int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]))


def open_mpi() -> Membership | None:
    """A process that mpirun started. Process 0 is on the host of the launcher, "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"."""
    env = os.environ
    launcher = re.match(r"(\d+)\.\d+;tcp://([^,:]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if launcher is None:
        return None
    return Membership(f"{launcher[2]}:{port_of_job(launcher[1])}", int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"]))


def tpu() -> Membership | None:
    """A host of one or more TPU slices. GKE describes them in variables, a TPU VM on its metadata server."""
    env = os.environ
    if hosts := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        worker = env["TPU_WORKER_ID"]
    else:
        try:
            hosts, worker, described = (metadata(key) for key in ("worker-network-endpoints", "agent-worker-number", "tpu-env"))
        except OSError:
            return None
        env = dict(re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", described, re.M)) | env
    # A host is "name", "name:port" or "name:id:address".
    hosts = [parts[2] if len(parts) == 3 else parts[0] for parts in (host.split(":") for host in hosts.split(","))]
    first = (env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    index = int(env.get("MEGASCALE_SLICE_ID") or 0) * len(hosts) + int(worker)
    count = int(env.get("MEGASCALE_NUM_SLICES") or 1) * len(hosts)
    return Membership(f"{first}:{env.get('JAX_COORDINATOR_PORT') or 8482}", count, index)


def metadata(key: str) -> str:
    """An attribute of this Google Cloud machine. Raises OSError elsewhere."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10) as answer:
        return answer.read().decode()


def port_of_job(job: str) -> str:
    """A port that all processes of a job derive from its number. The last port is left out, since the next one is used as well."""
    return os.environ.get("JAX_COORDINATOR_PORT") or str(61440 + int(job) % 4095)


def number(name: str, default: float | None = None) -> float:
    """A number from the environment. Raises ProcessGroupError."""
    text = os.environ.get(name, default)
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ProcessGroupError(f"{name}={text!r} is not a number") from None
