"""Joining the processes of a run, one per host of a slice or several on one machine, and exchanging small values between them."""

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
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from xomni_jax.core.cluster import membership, number
from xomni_jax.core.process_group import ProcessGroup, split_address

START_TIMEOUT = 300.0  # seconds for all processes to join; XOMNI_START_TIMEOUT changes it
HEARTBEAT_TIMEOUT = 100  # seconds after which JAX aborts because a process is silent; `process_group.SILENCE` comes first
BARRIERS = itertools.count()  # numbers the barriers of `connect`, which all processes pass in the same order
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # compiled into every program, so they must agree, too


def start(config: Mapping[str, Any], distributed: bool = False) -> ProcessGroup | None:
    """Joins the processes of a run, before any device is used. None for a run of one process.

    Args:
      config: the flat resolved configuration, {"config.seed": 0, ...}, which must be the same everywhere.
      distributed: the user says that there are several processes.

    Raises:
      ProcessGroupError: the environment contradicts itself, a process did not join, or one was started differently.
    """
    timeout = number("XOMNI_START_TIMEOUT", START_TIMEOUT)
    found = membership(distributed)
    if found is None:
        return None
    settings = dict(config) | {"the version of xomni_jax": package_version(), "the version of jax": jax.__version__}
    settings |= {name: os.environ.get(name, "") for name in FLAGS}
    print(f"waiting up to {timeout:g} s for the other processes", flush=True)
    # The group comes first, on the next port: JAX would abort this process if another one is missing.
    host, port = split_address(found.address)
    group = ProcessGroup(f"{host}:{port + 1}", found.index, found.count, settings, timeout)
    jax.distributed.initialize(
        *found, cluster_detection_method="deactivate", initialization_timeout=int(timeout), heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
    )
    return group


def connect(mesh: Mesh) -> None:
    """Opens the connections that collectives of a mesh need between CPU processes; other platforms need none.

    Gloo opens them at the first collective of each group of devices, and fails if another process is more than 30 seconds late, for
    instance because it still compiles. Over an open connection it waits half an hour.
    """
    if jax.process_count() == 1 or jax.devices()[0].platform != "cpu":
        return
    from orbax.checkpoint import multihost  # its barrier is JAX's with a timeout of choice

    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(1, len(axes) + 1) for group in itertools.combinations(axes, n)]
    sums = jax.shard_map(lambda: [jax.lax.psum(jnp.ones(()), group) for group in groups], mesh=mesh, in_specs=(), out_specs=PartitionSpec())
    with jax.set_mesh(mesh):  # the caller may have set another one
        meet = jax.jit(sums).lower().compile()  # before the barrier, so that nothing slow follows it
        timeout = number("XOMNI_START_TIMEOUT", START_TIMEOUT)
        multihost.get_barrier_sync_fn()(key=f"connect {next(BARRIERS)}", timeout_ms=int(1000 * timeout))
        jax.block_until_ready(meet())
    multihost_utils.sync_global_devices("connected")  # its group of devices is another one


def explain_silence(error: BaseException) -> str | None:
    """One sentence about a process that did not answer, if that is what `error` means; None for any other error.

    JAX raises the same errors wherever processes exchange something, such as while a checkpoint is read, and whether the other process
    is slow, hangs, was cut off or has ended.
    """
    while not isinstance(error, jax.errors.JaxRuntimeError):  # Orbax raises errors of its own because of it
        error = error.__cause__ or error.__context__
        if error is None:
            return None
    text = str(error)
    if not re.search(r"Gloo \S+.* failed|Barrier timed out", text):
        return None
    who, process_of = "another process", {device.id: device.process_index for device in jax.devices()}
    if key := re.search(r"gloo/([\d,]+)/(\d+)", text):  # the devices of a group, and which of them was not there
        who = f"process {process_of.get(int(key[1].split(',')[int(key[2])]), '?')}"
    elif names := re.search(r"timed out task names:\s+(\d+)", text):
        who = f"process {names[1]}"
    waited = re.search(r"duration: ([\d.]+)s|waiting (\d+)ms", text)
    within = f" within {float(waited[1] or float(waited[2]) / 1000):.3g} s" if waited else ""
    what = "has closed its connection" if "closed by peer" in text else f"did not answer{within}"
    return (
        f"{who} {what}: it has ended, hangs, or gets too little processor time; its own output may say which. The same command resumes "
        "from the newest checkpoint (XOMNI_DEBUG=1 shows the error of JAX)"
    )


def description() -> str:
    """Index and number of processes and devices: a line for the log."""
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    if jax.process_count() == 1:
        return f"one process, {devices}"
    return f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of {devices}"


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, by index. Every process must call it, with a small value."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
    room = 1 << max(10, int(sizes.max() - 1).bit_length())  # a power of two: every new size is compiled
    table = multihost_utils.process_allgather(np.frombuffer(data.ljust(room), np.uint8))
    return [json.loads(bytes(row[:size])) for row, size in zip(table.reshape(len(sizes), room), sizes)]


def package_version() -> str:
    """Of xomni_jax; "source" if it is used without being installed."""
    try:
        return metadata.version("xomni_jax")
    except metadata.PackageNotFoundError:
        return "source"
