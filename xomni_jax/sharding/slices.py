"""TPU slices by their cloud names: chips, topology and hosts of `v6e-64`, `v5p-64`, `v5litepod-256`. Standard library only."""

from __future__ import annotations

import dataclasses
import math

from xomni_jax.sharding.xla_flags import chip_of

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16))
TOPOLOGIES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP}
PREFIXES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
COUNTS_CORES = ("v4", "v5p", "tpu7x")  # their names count TensorCores, of which a chip has two


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice.

    Attributes:
      chip: v4 | v5e | v5p | v6e | tpu7x.
      topology: chips along each axis of the interconnect.
    """

    chip: str
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.topology)

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine: four, or the whole slice where it is a single chip or a flat one of eight."""
        return self.chips if self.topology in ((1, 1), (2, 4)) else 4

    @property
    def hosts(self) -> int:
        """Number of machines, and of JAX processes."""
        return self.chips // self.chips_per_host

    @property
    def name(self) -> str:
        """Cloud name, such as v6e-64."""
        return f"{PREFIXES[self.chip]}-{self.chips * (2 if self.chip in COUNTS_CORES else 1)}"


def parse(name: str) -> Slice:
    """The slice of a cloud name.

    Raises:
      ValueError: unknown chip, or a size that the cloud does not offer; the message lists those that it does.
    """
    chip = chip_of(name)
    known = {s.name: s for s in (Slice(chip, t) for t in TOPOLOGIES[chip])}
    key = name.strip().lower().replace("v5e-", "v5litepod-")
    if key not in known:
        raise ValueError(f"{name!r} is no slice of {chip}; there are {', '.join(known)}")
    return known[key]
