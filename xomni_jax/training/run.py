"""From a configuration to a finished run: mesh, stage, loop."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from xomni_jax.core.config import ConfigError, check_sections, run_config, save_resolved
from xomni_jax.core.distributed import connect, description
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.process_group import Line
from xomni_jax.sharding.mesh import make_mesh, split_devices
from xomni_jax.training.loop import train
from xomni_jax.training.operations import placement, say

# stage -> module with `SECTIONS` (what it reads of a configuration) and `make(config, run, mesh, stop) -> Stage`
STAGES = {
    "tokenizer": "xomni_jax.training.tokenizer",
    "pretrain": "xomni_jax.training.pretrain",
    "sft": "xomni_jax.training.pretrain",  # the same step and data format; stage and data differ by config alone
    "decoder": "xomni_jax.training.decoder",
    "grpo": "xomni_jax.rl.grpo",
}


def run_stage(config: ConfigDict, line: Line | None = None, profile: tuple[int, int] | None = None) -> Path | None:
    """Runs the stage a configuration names; returns the final model directory, or None when it was stopped early.

    Args:
      line: to the other processes of the run, from `distributed.start`.
      profile: first and last step of a trace in RUN/profile.
    """
    run = run_config(config)
    if profile and profile[1] > run.steps:
        raise ConfigError(f"--profile-steps {profile[0]}-{profile[1]}: the run has {run.steps} steps; name two of them")
    if run.stage not in STAGES:
        raise ConfigError(f"config.stage={run.stage!r} is unknown; use one of {', '.join(STAGES)}")
    module = importlib.import_module(STAGES[run.stage])
    check_sections(config, ("mesh", *module.SECTIONS), run.stage)
    mesh = policy_mesh(config)
    print(f"{run.stage}: {description()}, mesh {dict(mesh.shape)}, output in {run.run_dir}", flush=True)
    connect(mesh)
    with StopSignal(line) as stop, jax.set_mesh(mesh):
        stage = module.make(config, run, mesh, stop)
        say("\n".join(["weights:", *placement(stage.state.params, mesh)]))
        save_resolved(config, Path(run.run_dir), write=jax.process_index() == 0)
        return train(run, stage, stop, profile)


def policy_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of what is trained: `config.mesh` over all devices, without those of `config.decoder_mesh` where a stage has one."""
    devices = jax.devices() if devices is None else devices
    apart = math.prod(config.decoder_mesh.values()) if "decoder_mesh" in config else 0
    if apart:
        devices, _ = split_devices(devices, apart)
    return make_mesh(dict(config.mesh), devices)
