"""xomni train: one training stage from a config file."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xomni_jax.core.config import ConfigError, as_dict, flat, load_changes, read_overrides, shown
from xomni_jax.core.process_group import ProcessGroup

EXAMPLE = (
    "xomni train --config=configs/tiny/sft.py --config.init_from=xomni_jax/assets/tiny_sft --config.run_dir=runs/my_sft --config.steps=200"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config FILE and any number of --config.key=value."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(); see configs/")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every key with its value, its explanation and what changed it, and do nothing else",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, load one batch, compile, say what would happen with which operations and memory, and write nothing",
    )
    parser.add_argument(
        "--overfit", type=int, metavar="N", help="learn the first N examples again and again (as --config.data.first=N), to see that it can"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="simulate N CPU devices (to try a mesh on one machine)")
    parser.add_argument(
        "--distributed", action="store_true",
        help="join the other processes of this TPU slice, Slurm or Open MPI job; launch/local.py and GKE need no flag",
    )  # fmt: skip
    parser.add_argument("--profile-steps", metavar="A-B", help="trace steps A to B in RUN/profile, for xprof or TensorBoard; such as 3-8")
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs here (default $JAX_COMPILATION_CACHE_DIR); on a pod, where every host sees it",
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the stage; the run directory says what came of it."""
    if args.overfit is not None and args.overfit < 1:
        raise ConfigError(f"--overfit {args.overfit} must be at least 1")
    changes = load_changes(args.config, read_overrides(rest) + [f"data.first={args.overfit}"] * (args.overfit is not None))
    options: dict[str, Any] = {"dry_run": True} if args.dry_run else {}
    if args.profile_steps:
        from xomni_jax.training.operations import profile_range

        options["profile"] = profile_range(args.profile_steps)
    import jax

    if args.devices is not None:
        if args.devices < 1:
            raise ConfigError(f"--devices {args.devices} must be at least 1")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    from xomni_jax.core import distributed
    from xomni_jax.training.run import run_stage
    from xomni_jax.training.stage import resolve, resolve_run

    if args.print_config:
        print(shown(resolve(changes), changes))
        return 0
    config = resolve_run(changes)
    if not args.dry_run:
        print(f"curves: tensorboard --logdir {config.run_dir}/tensorboard   (pip install 'xomni_jax[tensorboard]' brings it)", flush=True)
    group = distributed.start(shared_settings(config), args.distributed)
    if group is None:
        return exit_code(run_stage(config, **options))
    return run_in_group(group, lambda: exit_code(run_stage(config, group=group, **options)))


def shared_settings(config: Any) -> dict[str, Any]:
    """What must be the same in every process of a run. The addresses of reward services may differ from host to host."""
    from xomni_jax.training.run_directory import is_address

    return {key: value for key, value in flat(as_dict(config), "config.").items() if not is_address(key)}


def run_in_group(group: ProcessGroup, action: Callable[[], int], command: str = "train") -> int:
    """Runs `action`, which returns the exit code. An error is reported here and to the other processes, and ends this one at once."""
    from xomni_jax.cli.main import explain
    from xomni_jax.core.distributed import explain_silence
    from xomni_jax.core.process_group import LOST_PEER, exit_now

    try:
        code = action()
    except BaseException as e:  # noqa: BLE001 - whatever it is, the others must not wait
        silence = None if os.environ.get("XOMNI_DEBUG") else explain_silence(e)
        try:
            if silence:
                time.sleep(1.0)  # if the other process is gone, the group names it and ends this one meanwhile
                print(f"\nxomni {command}: {silence}", file=sys.stderr)
            code = LOST_PEER if silence else explain(command, e)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            code = 1
        group.leave(silence or (str(e).strip().splitlines() or [type(e).__name__])[0])
        exit_now(code)
    group.leave()
    return code


def exit_code(model: Path | None) -> int:
    """0, or $XOMNI_STOPPED_CODE if the run was stopped and has saved: a launcher must take it neither for complete nor for failed."""
    return 0 if model else int(os.environ.get("XOMNI_STOPPED_CODE", "0"))
