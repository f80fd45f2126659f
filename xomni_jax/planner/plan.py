"""A plan: the roles of a configuration compiled for a topology, and what would fit where one does not."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from xomni_jax.core.config import ConfigError, apply_override
from xomni_jax.inference import STAGE
from xomni_jax.planner import chips, inference
from xomni_jax.planner.abstract import component
from xomni_jax.planner.check import budget
from xomni_jax.planner.chips import GIB, Topology
from xomni_jax.planner.compiled import compile_role, versions
from xomni_jax.planner.facts import Facts, read
from xomni_jax.planner.roles import Role, Stage, build_stage, choose
from xomni_jax.sharding.mesh import make_mesh, split_devices

TRIALS = 4  # proposals that are compiled for one role at most


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Changes of the configuration with which a role was found to fit, and what it then needs."""

    role: str
    overrides: tuple[str, ...]
    needs: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a report says; `whole` when every role of a training step is in it, `apart` the mesh of a decoder with its own devices."""

    stage: str
    topology: Topology
    mesh: dict[str, int]
    apart: dict[str, int]
    versions: dict[str, str]
    facts: list[Facts]
    proposals: list[Proposal]
    whole: bool


def make_plan(
    config: ConfigDict, topology: Topology, roles: Iterable[str], cache: Path, reserve: float, propose: bool = True, quiet: bool = False
) -> Plan:
    """Compiles the roles and reads their facts; for what does not fit, looks for what would.

    Raises:
      ConfigError: the configuration or its mesh is impossible on this topology.
    """
    stage, proposals = stage_on(config, topology), []
    found = list(compile_all(stage, choose(stage, roles), topology, cache, quiet))
    for f in found:
        if propose and f.fits_in > budget(topology, reserve):
            proposals += propose_for(config, f, topology, cache, reserve, quiet)
    whole = {r.name for r in stage.roles.values() if r.per_step} <= {f.role for f in found}
    apart = dict(stage.apart.shape) if stage.apart else {}
    return Plan(stage.name, topology, dict(stage.mesh.shape), apart, versions(topology), found, proposals, whole)


def compile_all(stage: Stage, roles: Collection[Role], topology: Topology, cache: Path, quiet: bool = False) -> Iterator[Facts]:
    """The facts of roles, one after the other, under a progress bar."""
    with tqdm(total=len(roles), desc=f"{stage.name} on {topology.name}", unit="role", disable=quiet, file=sys.stderr) as bar:
        for role in roles:
            with ticking(bar, role.name):
                facts = facts_of(role, stage, topology, cache)
            bar.update()
            yield facts


def stage_on(config: ConfigDict, topology: Topology) -> Stage:
    """The stage of a configuration on the meshes it asks for.

    Raises:
      ConfigError: they do not fill the topology; the message says which sizes would.
    """
    size = math.prod(config.decoder_mesh.values()) if "decoder_mesh" in config else 0
    devices, own = chips.devices(topology), []
    try:
        if size:
            devices, own = split_devices(devices, size)
        if size and topology.chip:  # the parts of a slice are compiled for as slices of as many chips
            devices, own = (chips.devices(chips.part(topology, len(part))) for part in (devices, own))
        mesh, apart = make_mesh(dict(config.mesh), devices), make_mesh(dict(config.decoder_mesh), own) if size else None
    except ValueError as e:
        raise ConfigError(f"{topology.name} ({topology.size} devices): {e}") from None
    return inference.build(config, mesh) if config.stage == STAGE else build_stage(config, mesh, apart)


def facts_of(role: Role, stage: Stage, topology: Topology, cache: Path) -> Facts:
    """Compiles one role and reads it."""
    return read(role, stage, compile_role(role.fn, role.args, stage.mesh_of(role), topology, cache))


def propose_for(config: ConfigDict, f: Facts, topology: Topology, cache: Path, reserve: float, quiet: bool) -> list[Proposal]:
    """The first change, of those that are likely to help, with which the role fits; compiled to be sure."""
    room, tried = budget(topology, reserve), 0
    for overrides in candidates(config, f):
        if tried == TRIALS:
            break
        changed = ConfigDict(config.to_dict())
        try:
            for override in overrides:
                apply_override(changed, override)
            stage = stage_on(changed, topology)
        except ValueError:
            continue  # not possible with the other settings
        tried += 1
        if not quiet:
            short = f"{f.role} does not fit ({f.fits_in / GIB:.1f} of {room / GIB:.1f} GiB)"
            print(f"{short}; trying {' '.join(overrides)}", file=sys.stderr, flush=True)
        trial = facts_of(stage.roles[f.role], stage, topology, cache)
        if trial.fits_in <= room:
            return [Proposal(f.role, tuple(overrides), trial.fits_in)]
    return []


def candidates(config: ConfigDict, f: Facts) -> Iterator[list[str]]:
    """Changes worth trying for a role, cheapest for the run first."""
    role, mesh = f.role, "decoder_mesh" if f.apart else "mesh"
    section = {"decoder-update": "mmdit", "tokenizer-update": "siglip_vq"}.get(role, "transformer")
    learns = role.endswith("update")
    remat = [f"{section}.remat=full"] if learns and component(config, section).remat != "full" else []
    smaller = []
    if role in ("policy-update", "reference"):
        rows = config.rollout.micro_batch or config.batch_size * config.grpo.rollouts_per_prompt // config.grpo.updates_per_batch
        smaller = [[f"rollout.micro_batch={rows // n}"] for n in (2, 4, 8) if rows % n == 0]
    elif role in ("rollout", "prefill", "answer", "decoder", "vae", "text"):
        part = {"decoder": "mmdit", "vae": "autoencoder"}.get(role)
        pieces = [[f"{part}.at_once=1"]] if part and component(config, part).at_once != 1 else []
        smaller = pieces + [fewer(config, role, n) for n in (2, 4)]
    elif role == "sft-update" or role == "pretrain-update":
        smaller = [[f"next_token.rows={config.next_token.rows // n}"] for n in (2, 4) if config.next_token.rows % n == 0]
    elif learns:
        smaller = [[f"batch_size={config.batch_size // n}"] for n in (2, 4) if config.batch_size % n == 0]
    meshes = [
        [f"{mesh}.fsdp={f.devices // t}", f"{mesh}.tensor={t}", f"{mesh}.data=1", f"{mesh}.replica=1"]
        for t in (4, 2, 1)
        if t != config[mesh].tensor and f.devices % t == 0
    ]
    if remat:
        yield remat
    yield from smaller
    yield from meshes
    for few in smaller[:2]:
        yield from (few + mesh for mesh in meshes)


def fewer(config: ConfigDict, role: str, n: int) -> list[str]:
    """A change with which a role draws an n-th of its images at a time."""
    if "rollout" in config:
        return [f"rollout.chunks={config.rollout.chunks * n}"]
    key = "decode_batch" if role in ("decoder", "vae", "text") else "batch"
    return [f"{key}={max(1, config[key] // n)}"]


class ticking:
    """Keeps a progress bar's clock running while the compiler is at work."""

    def __init__(self, bar: tqdm, what: str):
        self.bar, self.done = bar, threading.Event()
        bar.set_postfix_str(what)
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        while not self.done.wait(2.0 if sys.stderr.isatty() else 60.0):
            self.bar.refresh()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
