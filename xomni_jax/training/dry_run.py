"""What a run would do: its batch, its programs compiled for the devices that are present, their operations and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from xomni_jax.core.flops import count
from xomni_jax.core.folders import check_folder
from xomni_jax.core.program import Program
from xomni_jax.core.tables import bytes_text
from xomni_jax.data.sources import ENDLESS
from xomni_jax.sharding.abstract import path_name
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.components import planned_configs
from xomni_jax.training.operations import PEAK
from xomni_jax.training.stage import STAGES, RunConfig, RunningStage, meshes


def report(cfg: RunConfig, running: RunningStage, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """Lines about a run that is ready for its first step, which is not made. ConfigError when its first checkpoint has no room."""
    yield from ("first batch:", *map("  ".__add__, described(next(running.batches))))
    stage, own = STAGES.get(cfg.stage), meshes(cfg, jax.devices())[1]
    decoder_mesh = make_mesh(cfg.decoder_mesh.sizes(), own) if own else None
    made = stage.programs(cfg, planned_configs(cfg, stage.components, cfg.init_from), mesh, decoder_mesh)
    operations = 0.0
    for name, program in made.programs.items():
        if program.per_step:
            flops, memory = compiled(program, made.mesh_of(program))
            operations += flops * program.per_step
            yield f"{name}: {program.about}; {flops:.3g} operations, {program.per_step} times a step; {memory}"
    peak = PEAK.get(jax.devices()[0].device_kind)
    at_best = f", {operations / peak / jax.device_count():.3g} s at the devices' peak" if peak else ""
    yield f"a step: {operations:.3g} operations{at_best}, {running.items_per_step} examples"
    state = sum(x.nbytes for x in jax.tree.leaves(running.state))
    check_folder(Path(cfg.run_dir), state)
    yield from plan(cfg, running.items_per_step, state)
    yield "dry run: nothing was written"


def compiled(program: Program, mesh: jax.sharding.Mesh) -> tuple[float, str]:
    """Compiles a program for the devices of its mesh -> (operations over all of them, bytes of a device as text)."""
    with jax.set_mesh(mesh):
        traced = program.fn.trace(*program.args)
        memory = traced.lower().compile().memory_analysis()
    kinds = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "outputs": memory.output_size_in_bytes}
    return count(traced.jaxpr).total, "a device holds " + ", ".join(f"{kind} {bytes_text(size)}" for kind, size in kinds.items())


def described(batch: Any) -> Iterator[str]:
    """A line for every array, text and number of a batch."""
    for path, value in jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda x: isinstance(x, list)):
        name = path_name(path)
        if isinstance(value, list):
            yield f"{name}: {len(value)}, the first {value[0]!r}"
        else:
            yield f"{name}: {value.dtype} {'x'.join(map(str, value.shape))}" if hasattr(value, "shape") else f"{name}: {value:.4g}"


def plan(cfg: RunConfig, examples: int, state: int) -> Iterator[str]:
    """What the run would do with its steps."""
    made = max((int(folder.name) for folder in Path(cfg.run_dir, "checkpoints").glob("*") if folder.name.isdigit()), default=0)
    begins = f"go on after step {made} to" if made else "go to"
    saves = f"save {bytes_text(state)} every {cfg.save_every} steps and keep the last {cfg.keep}"
    yield f"it would {begins} step {cfg.steps} in {cfg.run_dir}, {saves}"
    data = cfg.data
    if data.first:
        yield f"it would learn the first {data.first} examples of config.data again and again"
        return
    if (records := len(data.epoch())) < ENDLESS:
        yield f"it would see each of {records} records {cfg.steps * examples / records:.3g} times"
