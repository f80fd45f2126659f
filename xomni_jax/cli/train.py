"""xomni train: one training stage from a config file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xomni_jax.training.config import ConfigError, load_config

EXAMPLE = "xomni train --config=configs/tiny/sft.py --config.run_dir=runs/my_sft --config.steps=200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config FILE and any number of --config.key=value."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(); see configs/")
    parser.add_argument("--devices", type=int, metavar="N", help="simulate N CPU devices (to try a mesh on one machine)")
    parser.usage = "xomni train --config=FILE [--config.KEY=VALUE ...] [--devices N]"


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the stage; the run directory says what came of it."""
    overrides = []
    for argument in rest:
        if not argument.startswith("--config."):
            raise ConfigError(f"unknown argument {argument!r}; overrides are written --config.KEY=VALUE")
        overrides.append(argument.removeprefix("--config."))
    config = load_config(args.config, overrides)
    if args.devices is not None:
        if args.devices < 1:
            raise ConfigError(f"--devices {args.devices} must be at least 1")
        import jax

        jax.config.update("jax_num_cpu_devices", args.devices)
    from xomni_jax.training.run import run_stage

    return exit_code(run_stage(config))


def exit_code(model: Path | None) -> int:
    """0, or what the launchers ask for in XOMNI_STOPPED_CODE when a run was stopped and has saved: it must count neither as complete nor as failed."""
    return 0 if model else int(os.environ.get("XOMNI_STOPPED_CODE", "0"))
