"""Start-up of a run over several processes: one per host of a slice, or several on one machine.

Process counts come from the environment, in this order:

    XOMNI_PROCESSES, XOMNI_PROCESS, JAX_COORDINATOR_ADDRESS   number of processes, index of this one, host:port of process 0 (launch/local.py sets them)
    --distributed, JAX_COORDINATOR_ADDRESS alone, or          JAX finds the others by itself: TPU metadata, GKE, Slurm, Open MPI
    several TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES > 1
    none of these                                             one process
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # neither is public
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from xomni_jax.core.process_group import Line, LineError, split_address

DEADLINE = 300.0  # seconds for all processes to arrive; XOMNI_START_TIMEOUT changes it
HEARTBEAT = 60  # seconds after which JAX takes a silent process for dead
MEETINGS = itertools.count()  # numbers the barriers, which all pass in the same order
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # compiled into every program: they must agree, too


def start(config: Mapping[str, Any], distributed: bool = False) -> Line | None:
    """Joins the processes of a run, before any device is used. None for a run of one process.

    Args:
      config: the flat resolved configuration, {"config.seed": 0, ...}, which must be the same everywhere.
      distributed: the user says that there are several processes.

    Raises:
      LineError: the settings contradict each other, somebody did not come, or somebody was started with something else.
    """
    facts = dict(config) | {"the version of xomni_jax": version("xomni_jax"), "the version of jax": jax.__version__}
    facts |= {name: os.environ.get(name, "") for name in FLAGS}
    deadline = number("XOMNI_START_TIMEOUT", DEADLINE)
    asked = {name: os.environ.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "XOMNI_PROCESSES", "XOMNI_PROCESS")}
    if asked["XOMNI_PROCESSES"] or asked["XOMNI_PROCESS"]:
        lacking = [name for name, value in asked.items() if not value]
        if lacking:
            raise LineError(f"{lacking[0]} is not set; a run of several processes needs {', '.join(asked)} (launch/local.py sets them)")
        count, index = int(number("XOMNI_PROCESSES")), int(number("XOMNI_PROCESS"))
        if not 0 <= index < count:
            raise LineError(f"XOMNI_PROCESS={index} of XOMNI_PROCESSES={count}: processes are numbered from 0 to {count - 1}")
        return _explicit(asked["JAX_COORDINATOR_ADDRESS"], index, count, facts, deadline)
    if distributed or asked["JAX_COORDINATOR_ADDRESS"] or several_workers():
        return _detected(facts, deadline)
    return None


def _explicit(address: str, index: int, count: int, facts: Mapping[str, Any], deadline: float) -> Line:
    """The roll is called on the port after the coordinator's before JAX starts, which would end the process where somebody is missing."""
    host, port = split_address(address)
    line = Line(f"{host}:{port + 1}", index, count, facts, deadline)
    jax.distributed.initialize(
        address,
        count,
        index,
        cluster_detection_method="deactivate",
        initialization_timeout=int(deadline),
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    return line


def _detected(facts: Mapping[str, Any], deadline: float) -> Line:
    """JAX knows the others from what surrounds the process; its own roll call would end the process where somebody is missing."""
    print(f"waiting up to {deadline:g} s for the other processes", flush=True)
    asked = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(asked, None, None, None, None, int(deadline))
    except (RuntimeError, ValueError) as e:
        told = str(e).strip().splitlines()[0]
        raise LineError(f"the other processes are not known ({told}); see that this host's name and network are set up") from None
    if None in (address, count, index):
        raise LineError(
            "no several processes were found: this is no TPU slice, Slurm or Open MPI job that JAX knows; leave --distributed out on one machine, or set "
            "JAX_COORDINATOR_ADDRESS, XOMNI_PROCESSES and XOMNI_PROCESS"
        )
    return _explicit(address, index, count, facts, deadline)


def connect(mesh: Mesh) -> None:
    """Opens the connections for a mesh's collectives between CPU processes, while all are here; elsewhere there is nothing to open.

    Gloo opens them when a group of devices first exchanges something, waits 30 seconds for the others, and cannot be told to wait longer: a process
    that is slow to compile or to read would end the run. Over an open connection it waits half an hour.
    """
    if jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(1, len(axes) + 1) for group in itertools.combinations(axes, n)]
    sums = jax.shard_map(lambda: [jax.lax.psum(jnp.ones(()), group) for group in groups], mesh=mesh, in_specs=(), out_specs=PartitionSpec())
    with jax.set_mesh(mesh):  # a caller may work on another
        meet = jax.jit(sums).lower().compile()  # before the wait: what follows takes no time
        global_state.client.wait_at_barrier(f"connect {next(MEETINGS)}", int(1000 * number("XOMNI_START_TIMEOUT", DEADLINE)))
        jax.block_until_ready(meet())
    barrier("connected")  # whose groups are others


def unanswered(error: BaseException) -> str | None:
    """What the failure of an exchange between processes means, in one sentence; None for any other error.

    JAX tells of it alike wherever it happens, such as in the reading of a checkpoint, and for a process that is slow, hangs, was cut off or has ended.
    """
    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or not re.search(r"Gloo \S+.* failed|Barrier timed out", text):
        return None
    who, process_of = "another process", {device.id: device.process_index for device in jax.devices()}
    if key := re.search(r"gloo/([\d,]+)/(\d+)", text):  # the devices of a group, and whose place among them was not there
        who = f"process {process_of.get(int(key[1].split(',')[int(key[2])]), '?')}"
    elif names := re.search(r"timed out task names:\s+(\d+)", text):
        who = f"process {names[1]}"
    waited = re.search(r"duration: ([\d.]+)s|waiting (\d+)ms", text)
    within = f" within {float(waited[1] or float(waited[2]) / 1000):.3g} s" if waited else ""
    what = "has closed its connection" if "closed by peer" in text else f"did not answer{within}"
    return (
        f"{who} {what}: it has ended, hangs, or is starved of processor time, and its own output may say which. Once it can run, the same command "
        "goes on from what was saved (XOMNI_DEBUG=1 shows what was waited for)"
    )


def several_workers() -> bool:
    """Whether the environment of a TPU slice (GKE sets it) names more than this host."""
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "")
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or (slices.isdigit() and int(slices) > 1)


def description() -> str:
    """Which kind of start was chosen, with indices and device counts: a line for the log."""
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    if jax.process_count() == 1:
        return f"one process, {devices}"
    return f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of {devices}"


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, by index. Every process must call it; small things only."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
    room = 1 << max(10, int(sizes.max() - 1).bit_length())  # few sizes: each is compiled once
    table = multihost_utils.process_allgather(np.frombuffer(data.ljust(room), np.uint8))
    return [json.loads(bytes(row[:size])) for row, size in zip(table.reshape(len(sizes), room), sizes)]


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def version(package: str) -> str:
    """Of an installed package; "source" where it is used without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source"


def number(name: str, default: float | None = None) -> float:
    """A number from the environment."""
    text = os.environ.get(name, default)
    try:
        return float(text)
    except (TypeError, ValueError):
        raise LineError(f"{name}={text!r} is no number") from None
