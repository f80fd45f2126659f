"""A plan: the programs of a configuration compiled for a topology, and what would fit where one does not."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xomni_jax.core.config import ConfigError, merge_overrides, updated
from xomni_jax.core.program import Programs
from xomni_jax.planner import chips
from xomni_jax.planner.analysis import ProgramAnalysis, analyse
from xomni_jax.planner.check import budget
from xomni_jax.planner.chips import GIB, RESERVE, Topology
from xomni_jax.planner.compiled import compile_program, versions
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.components import planned_configs
from xomni_jax.training.stage import STAGES, meshes

TRIALS = 4  # proposals that are compiled for one program at most


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Overrides with which a program was found to fit, and the bytes that it then needs."""

    program: str
    overrides: tuple[str, ...]
    needs: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a report says.

    Attributes:
      decoder_mesh: of an image decoder with devices of its own; empty otherwise.
      whole: every program of a training step is among `analyses`.
      reserve: share of HBM that must stay free.
    """

    stage: str
    topology: Topology
    mesh: dict[str, int]
    decoder_mesh: dict[str, int]
    versions: dict[str, str]
    analyses: list[ProgramAnalysis]
    proposals: list[Proposal]
    whole: bool
    reserve: float = RESERVE

    @property
    def room(self) -> float:
        """Bytes of a device that a program may use; infinite on a CPU."""
        return budget(self.topology, self.reserve)


def make_plan(
    cfg: Any, topology: Topology, names: Collection[str], cache: Path, reserve: float = RESERVE, propose: bool = True, quiet: bool = False
) -> Plan:
    """Compiles the named programs of a configuration and analyses them; for what does not fit, looks for what would.

    Raises:
      ConfigError: the configuration or its mesh is impossible on this topology.
    """
    made, proposals = programs_on(cfg, topology), []
    title = f"{cfg.stage} on {topology.name}"
    found = list(compile_all(made, choose(cfg.stage, made, names), title, topology, cache, quiet))
    for a in found:
        if propose and a.fits_in > budget(topology, reserve):
            proposals += propose_for(cfg, a, topology, cache, reserve, quiet)
    whole = {name for name, p in made.programs.items() if p.per_step} <= {a.program for a in found}
    apart = dict(made.decoder_mesh.shape) if made.decoder_mesh else {}
    return Plan(cfg.stage, topology, dict(made.mesh.shape), apart, versions(topology), found, proposals, whole, reserve)


def choose(stage: str, made: Programs, names: Collection[str]) -> Collection[str]:
    """The programs asked for; "all" is every one.

    Raises:
      ConfigError: the stage has no such program.
    """
    for name in names:
        if name != "all" and name not in made.programs:
            raise ConfigError(f"--program {name}: stage {stage} has no such program; it has {', '.join(made.programs)}, and all")
    return list(made.programs) if "all" in names else names


def compile_all(
    made: Programs, names: Collection[str], title: str, topology: Topology, cache: Path, quiet: bool = False
) -> Iterator[ProgramAnalysis]:
    """The analyses of programs, one after the other, under a progress bar."""
    with tqdm(total=len(names), desc=title, unit="program", disable=quiet, file=sys.stderr) as bar:
        for name in names:
            with ticking(bar, name):
                analysis = analyse_program(name, made, topology, cache)
            bar.update()
            yield analysis


def programs_on(cfg: Any, topology: Topology) -> Programs:
    """The programs of a configuration on its meshes.

    Raises:
      ConfigError: they do not fill the topology (the message says which sizes would), or the stage refuses the configuration.
    """
    stage = STAGES.get(cfg.stage)
    if "mmdit" in stage.components and "transformer" not in stage.components and len(cfg.data.sizes) != 1:
        raise ConfigError(f"config.data.sizes={cfg.data.sizes} must hold one size to be planned: a program has one static shape")
    try:
        devices, own = meshes(cfg, chips.devices(topology))
        if own and topology.chip:  # the compiler knows whole slices only, so each part is compiled as a slice of its size
            devices, own = (chips.devices(chips.part(topology, len(part))) for part in (devices, own))
        mesh, decoder_mesh = make_mesh(cfg.mesh.sizes(), devices), make_mesh(cfg.decoder_mesh.sizes(), own) if own else None
    except ValueError as e:
        raise ConfigError(f"{topology.name} ({topology.size} devices): {e}") from None
    return stage.programs(cfg, planned_configs(cfg, stage.components, model_directory(cfg)), mesh, decoder_mesh)


def model_directory(cfg: Any) -> str:
    """The model directory that a run starts from, or that inference uses."""
    return cfg.model if hasattr(cfg, "model") else cfg.init_from


def analyse_program(name: str, made: Programs, topology: Topology, cache: Path) -> ProgramAnalysis:
    """Compiles one program and reads it."""
    program = made[name]
    return analyse(name, made, compile_program(program.fn, program.args, made.mesh_of(program), topology, cache))


def propose_for(cfg: Any, a: ProgramAnalysis, topology: Topology, cache: Path, reserve: float, quiet: bool) -> list[Proposal]:
    """The first of `candidates` with which the program, compiled anew, fits; none of more than TRIALS."""
    room, tried = budget(topology, reserve), 0
    for overrides in candidates(cfg, a):
        if tried == TRIALS:
            break
        values: dict[str, Any] = {}
        merge_overrides(values, overrides)
        try:
            made = programs_on(updated(cfg, values), topology)
        except ValueError:
            continue  # not possible with the other settings
        tried += 1
        if not quiet:
            short = f"{a.program} does not fit ({a.fits_in / GIB:.1f} of {room / GIB:.1f} GiB)"
            print(f"{short}; trying {' '.join(overrides)}", file=sys.stderr, flush=True)
        trial = analyse_program(a.program, made, topology, cache)
        if trial.fits_in <= room:
            return [Proposal(a.program, tuple(overrides), trial.fits_in)]
    return []


def candidates(cfg: Any, a: ProgramAnalysis) -> Iterator[list[str]]:
    """Overrides worth trying for a program; those that slow the run least come first."""
    name, mesh = a.base, "decoder_mesh" if a.on_decoder_mesh else "mesh"
    section = {"decoder-update": "mmdit", "tokenizer-update": "siglip_vq", "vq-update": "llamagen_vq"}.get(name, "transformer")
    component = lambda part: planned_configs(cfg, [part], model_directory(cfg))[part]
    learns = name.endswith("update")
    remat = [f"{section}.remat=full"] if learns and getattr(component(section), "remat", "full") != "full" else []
    smaller = []
    if learns or name == "reference":
        smaller = [[f"accumulate={cfg.accumulate * n}"] for n in (2, 4, 8)]
    elif name in ("rollout", "prefill", "answer", "decoder", "vae", "text"):
        part = {"decoder": "mmdit", "vae": "autoencoder"}.get(name)
        pieces = [[f"{part}.microbatch=1"]] if part and component(part).microbatch != 1 else []
        smaller = pieces + [fewer(cfg, name, n) for n in (2, 4)]
    splits = [
        [f"{mesh}.fsdp={a.devices // t}", f"{mesh}.tensor={t}", f"{mesh}.data=1", f"{mesh}.replica=1"]
        for t in (4, 2, 1)
        if t != getattr(cfg, mesh).tensor and a.devices % t == 0
    ]
    if remat:
        yield remat
    yield from smaller
    yield from splits
    for few in smaller[:2]:
        yield from (few + split for split in splits)


def fewer(cfg: Any, name: str, n: int) -> list[str]:
    """The override with which a program handles an n-th of its images at a time."""
    if hasattr(cfg, "rollout"):
        return [f"rollout.chunks={cfg.rollout.chunks * n}"]
    key = "decode_batch" if name in ("decoder", "vae", "text") else "batch"
    return [f"{key}={max(1, getattr(cfg, key) // n)}"]


@contextmanager
def ticking(bar: tqdm, what: str) -> Iterator[None]:
    """Names the present work beside a progress bar and refreshes its clock, since the compiler does not."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(2.0 if sys.stderr.isatty() else 60.0):
            bar.refresh()

    bar.set_postfix_str(what)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
