"""From a configuration to a finished run: mesh, stage, loop."""

from __future__ import annotations

import dataclasses
from contextlib import closing, nullcontext
from pathlib import Path

import jax

from xomni_jax.checkpoint.store import write_json
from xomni_jax.core.config import ConfigError
from xomni_jax.core.distributed import connect, description
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.process_group import ProcessGroup
from xomni_jax.data.mixture import summary
from xomni_jax.evaluation.held_out import with_benchmarks
from xomni_jax.training.dry_run import report as dry_run_report
from xomni_jax.training.loop import train
from xomni_jax.training.metrics import check_wandb
from xomni_jax.training.operations import placement, say
from xomni_jax.training.run_directory import check_continues, check_room, claimed, save_config
from xomni_jax.training.stage import STAGES, RunConfig, policy_mesh


def run_stage(
    cfg: RunConfig, group: ProcessGroup | None = None, profile: tuple[int, int] | None = None, dry_run: bool = False
) -> Path | None:
    """Runs the stage a configuration names; returns the final model directory, or None when it was stopped early.

    Args:
      group: the processes of the run, from `distributed.start`.
      profile: first and last step of a trace in RUN/profile.
      dry_run: make everything ready, report on it, write nothing and return the run directory.
    """
    if profile and profile[1] > cfg.steps:
        raise ConfigError(f"--profile-steps {profile[0]}-{profile[1]}: the run has {cfg.steps} steps; name two of them")
    if hasattr(cfg, "data"):  # a stage of one's own need not have any
        cfg = dataclasses.replace(cfg, data=with_benchmarks(cfg.data))
    run_dir, mesh, first = Path(cfg.run_dir), policy_mesh(cfg), jax.process_index() == 0
    if cfg.wandb and first:
        check_wandb(cfg.wandb)
    print(f"{cfg.stage}: {description()}, mesh {dict(mesh.shape)}, output in {run_dir}", flush=True)
    with claimed(run_dir) if first and not dry_run else nullcontext(), StopSignal(group) as stop, jax.set_mesh(mesh):
        check_continues(cfg)
        connect(mesh)
        stage = STAGES.get(cfg.stage).make(cfg, mesh, stop)
        shares = summary(cfg.data, cfg.seed, cfg.batch_size, cfg.steps) if hasattr(cfg, "data") else []
        say("\n".join(["weights:", *placement(stage.state.params, mesh), *shares]))
        if dry_run:
            with closing(stage):
                for line in dry_run_report(cfg, stage, mesh):
                    say(line)
            return run_dir
        if first:
            check_room(run_dir, sum(x.nbytes for x in jax.tree.leaves(stage.state)))
            save_config(cfg)
            for name, value in stage.record.items():
                write_json(run_dir / f"{name}.json", value)
        return train(cfg, stage, stop, profile)
