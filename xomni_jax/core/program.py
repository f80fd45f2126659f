"""Programs: jitted functions with abstract arguments, which a trainer runs and a planner compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Work:
    """The minimal work of one execution of a program.

    Attributes:
      learned: operations with weights in forward and backward passes, 6 x parameters x tokens.
      forward: operations with weights in passes without a gradient, 2 x parameters x tokens.
      attention: operations of attention products, causal ones halved.
      tokens: that the execution reads or makes.
      images: that it finishes.
      floor: bytes of HBM that a device must at least move in each of `steps` decoding steps (0: no lower bound).
      cache: bytes of the key-value cache on a device.
      gathered, reduced: bytes of weights and of gradients that a device receives over fsdp.
      logits_limit: most positions whose logits should exist at the same time (0: no limit).
      vocabularies: widths of the output heads that nothing else has.
      head_gathers: most gathers of output heads, one for each head and set of weights.
      open_loops: loops whose length depends on data; they are counted once.
    """

    learned: float = 0.0
    forward: float = 0.0
    attention: float = 0.0
    tokens: int = 0
    images: int = 0
    floor: float = 0.0
    cache: float = 0.0
    steps: int = 1
    gathered: float = 0.0
    reduced: float = 0.0
    logits_limit: int = 0
    vocabularies: tuple[int, ...] = ()
    head_gathers: int = 0
    open_loops: int = 0


@dataclasses.dataclass
class Program:
    """One jitted function of a stage.

    Attributes:
      fn: the jitted function. args: its abstract arguments with their shardings.
      about: what it does, with its sizes.
      work: the least arithmetic and traffic that it needs.
      uses: groups of persistent arrays among its arguments. freed: groups that are released before it runs.
      per_step: executions in a training step; 0 for a part of another program that is also looked at alone,
        and for the same program at a further image size, whose name ends in @HEIGHTxWIDTH.
      state: the donated argument, if any.
      on_decoder_mesh: it runs on the image decoder's own devices.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    about: str
    work: Work
    uses: tuple[str, ...] = ()
    freed: tuple[str, ...] = ()
    per_step: int = 1
    state: Any = None
    on_decoder_mesh: bool = False


@dataclasses.dataclass
class Programs:
    """All programs of a stage on its meshes.

    Attributes:
      mesh: of what is trained, and of everything that has no devices of its own.
      programs: by name.
      persistent: {group: arrays} that stay on their devices through a whole step, whichever program runs.
      create: makes the starting training state on its devices; None where nothing is trained.
      decoder_mesh: of an image decoder with devices of its own. on_decoder_mesh: groups of `persistent` that lie there.
    """

    mesh: Mesh
    programs: dict[str, Program]
    persistent: dict[str, Any]
    create: Callable[[], Any] | None = None
    decoder_mesh: Mesh | None = None
    on_decoder_mesh: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Program:
        return self.programs[name]

    def mesh_of(self, program: Program) -> Mesh:
        """Where a program runs."""
        return self.decoder_mesh if program.on_decoder_mesh else self.mesh
