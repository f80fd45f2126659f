"""Construction of device meshes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from msgspec import Meta

from xomni_jax.sharding.rules import MESH_AXES

Parts = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of a mesh has.

    Attributes:
      replica: whole copies of the model, one or more a TPU slice; the only axis that may lie between slices
      data: copies of the model within a slice; each sees its own rows of a batch
      fsdp: parts that weights are split into and gathered from when needed; rows of a batch are split over it, too; -1: the remaining
        devices
      tensor: parts that attention heads and the MLP's width are split into
    """

    replica: Parts = 1
    data: Parts = 1
    fsdp: Parts = -1
    tensor: Parts = 1

    def sizes(self) -> dict[str, int]:
        """{axis: devices}, as `make_mesh` takes it."""
        return dataclasses.asdict(self)


def make_mesh(axes: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """A mesh over (replica, data, fsdp, tensor). An axis left out is 1; one axis may be -1: all remaining devices.

    Axis types are Auto: linen's modules are written for the partitioner, and `jax.make_mesh` would make them Explicit.

    Raises:
      ValueError: unknown axis, or the sizes do not multiply to the number of devices.
    """
    sizes = {name: 1 for name in MESH_AXES} | dict(axes or {"fsdp": -1})
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; known axes: {', '.join(MESH_AXES)}")
    bad = [name for name, size in sizes.items() if size < 1 and size != -1]
    if bad:
        raise ValueError(f"mesh {bad[0]}={sizes[bad[0]]!r} is not a number of devices; use 1 or more, or -1 for the remaining devices")
    devices = jax.devices() if devices is None else list(devices)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"mesh: only one axis may be -1, got {' and '.join(free)}; give the others a number")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size not in (1, -1)) or "1"
        needs = f"a multiple of {fixed}" if free else f"{fixed}"
        remedy = "change config.mesh"
        if math.prod(sizes.values()) > len(devices) and (hosts := jax.process_count()) > 1:
            each = len(devices) // hosts
            remedy = f"that is {hosts} hosts with {each} each; start it on {-(-fixed // each)} hosts, or {remedy}"
        raise ValueError(f"mesh {asked} needs {needs} devices, {len(devices)} are present; {remedy}")
    grid = arrange(tuple(sizes[a] for a in MESH_AXES), devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours on the torus where possible. Only the first axis, replica, crosses TPU slices.

    Raises:
      ValueError: there are several slices, and replica is not a multiple of their number.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices == 1 and has_holes(devices):
        return np.array(sorted(devices, key=lambda d: (*d.coords, d.core_on_chip))).reshape(shape)
    if slices <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(
            f"mesh replica={shape[0]} does not divide over {slices} slices, and no other axis may lie between them; "
            f"use replica={slices} or a multiple"
        )
    within, between = (shape[0] // slices, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def has_holes(devices: Sequence[jax.Device]) -> bool:
    """Whether the devices do not fill their bounding cuboid, because a decoder has some of its own; no mesh axis then follows the torus."""
    sides = (max(c) - min(c) + 1 for c in zip(*((*d.coords, d.core_on_chip) for d in devices)))
    return math.prod(sides) != len(devices)


def split_devices(devices: Sequence[jax.Device], apart: int) -> tuple[list[jax.Device], list[jax.Device]]:
    """(the rest, `apart` devices): the same number from every process, so that each process takes part in both meshes.

    Raises:
      ValueError: `apart` is not a multiple of the processes, or leaves one of them without devices.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    each, odd = divmod(apart, len(by_process))
    least = min(map(len, by_process.values()))
    if odd or not 0 < each < least:
        fit = ", ".join(str(n * len(by_process)) for n in range(1, least)) or "no separate mesh"
        raise ValueError(
            f"{apart} of {len(devices)} devices apart: {len(by_process)} processes with at least {least} devices each allow {fit}"
        )
    halves = [(own[:-each], own[-each:]) for own in by_process.values()]
    return [d for rest, _ in halves for d in rest], [d for _, own in halves for d in own]


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())
