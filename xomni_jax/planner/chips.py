"""Published peaks of TPU chips, names of slices, and device descriptions with which to compile without the devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from xomni_jax.sharding import slices

GIB = 2**30
RESERVE = 0.06  # share of HBM left to the runtime's own buffers and to fragmentation


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation; numbers are per JAX device.

    Attributes:
      hbm: bytes that the compiler lets a program use.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second of HBM.
      link: bytes per second of one link, one way.
      axes: dimensions of the torus.
      devices: JAX devices per chip.
    """

    name: str
    hbm: int
    flops: float
    bandwidth: float
    link: float
    axes: int
    devices: int

    @property
    def slices(self) -> tuple[str, ...]:
        """Published topologies of whole hosts."""
        return tuple("x".join(map(str, sides)) for sides in slices.TOPOLOGIES[self.name] if math.prod(sides) >= 4)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(15.25 * GIB), 137.5e12, 600e9, 45e9, 3, 2),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 45e9, 2, 1),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 90e9, 3, 1),
        Chip("v6e", int(31.25 * GIB), 918e12, 1640e9, 90e9, 2, 1),
        Chip("tpu7x", int(94.75 * GIB), 1153.5e12, 3690e9, 90e9, 3, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `v5p:2x4x4`, or `cpu:8` for simulated devices, for which `chip` is None; `size` counts JAX devices."""

    name: str
    chip: Chip | None
    size: int

    @property
    def cloud(self) -> str:
        """The cloud's name of the slice, such as v5p-64."""
        if self.chip is None:
            return self.name
        return slices.Slice(self.chip.name, tuple(map(int, self.name.split(":")[1].split("x")))).name

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return self.size // (self.chip.devices if self.chip else 1)


def parse(name: str) -> Topology:
    """A topology by its name: `v6e:8x8`; the cloud's `v6e-64`, `v5p-64`, `v5litepod-256`; or `cpu:8`.

    Raises:
      ValueError: it is unknown; the message lists what is known.
    """
    text = name.strip().lower()
    if found := re.fullmatch(r"cpu:([1-9]\d*)", text):
        return Topology(text, None, int(found.group(1)))
    if re.fullmatch(rf"({'|'.join((*CHIPS, *slices.PREFIXES.values()))})-\d+", text):
        rented = slices.parse(text)
        text = f"{rented.chip}:{'x'.join(map(str, rented.topology))}"
    kind, _, layout = text.partition(":")
    chip = CHIPS.get(kind)
    if chip and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        sides = [int(n) for n in layout.split("x")]
        whole_hosts = len(sides) == chip.axes and all(n % 2 == 0 for n in sides[:2])
        if whole_hosts:
            return Topology(text, chip, math.prod(sides) * chip.devices)
        raise ValueError(f"topology {name!r}: a {kind} slice has {chip.axes} sides, the first two even; such as {kind}:{chip.slices[3]}")
    raise ValueError(f"topology {name!r} is unknown; {known()}")


def part(topology: Topology, size: int) -> Topology:
    """The most compact slice of `size` devices, in place of a part of a topology: the compiler knows only whole slices.

    Raises:
      ValueError: there is no slice of that size.
    """
    chip = topology.chip
    if chip is None:
        return Topology(f"cpu:{size}", None, size)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    boxes = itertools.product(divisors, repeat=chip.axes)
    whole = [sides for sides in boxes if math.prod(sides) * chip.devices == size and sides[0] % 2 == sides[1] % 2 == 0]
    if not whole:
        raise ValueError(f"{size} of {topology.name}'s {topology.size} devices are no {chip.name} slice of their own, which planning needs")
    return parse(f"{chip.name}:{'x'.join(map(str, min(whole, key=sum)))}")


def known() -> str:
    """The known topologies, for messages."""
    rows = "; ".join(f"{c.name}:{{{','.join(c.slices)}}}" for c in CHIPS.values())
    return f"known are {rows}; cpu:N for simulated devices; and names as rented, such as v5p-64, v6e-64, v5litepod-256"


def devices(topology: Topology) -> Sequence[Any]:
    """Devices for a mesh: descriptions of the slice's chips, or simulated CPU devices.

    Raises:
      ValueError: libtpu is not installed.
    """
    import jax

    if topology.chip is None:
        return jax.devices()[: topology.size]
    if importlib.util.find_spec("libtpu") is None:
        extra = "pip install 'xomni_jax[plan]' brings it; cpu:8 works without"
        raise ValueError(f"topology {topology.name} needs libtpu to compile for it: {extra}")
    from jax.experimental import topologies

    # Read when libtpu is loaded: no queries for cloud metadata, and several processes may compile at once.
    settings = dict(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-16", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices


def prepare(topology: Topology) -> None:
    """Sets JAX up for planning, before its backend starts: only the CPU, with as many simulated devices as the topology has."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip is None:
        import jax

        if jax.config.jax_num_cpu_devices < topology.size:
            jax.config.update("jax_num_cpu_devices", topology.size)
