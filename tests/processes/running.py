"""Starting processes from a test, with a bound on how long they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.miniature import ROOT

LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
TRAIN = [sys.executable, "-m", "xomni_jax.cli.main", "train"]

# Before a command of launch/local.py: tells it where it is as srun does, and nothing else.
SLURM = ["sh", "-c", """
export SLURM_JOB_ID=1 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=$XOMNI_PROCESSES SLURM_PROCID=$XOMNI_PROCESS SLURM_LOCALID=$XOMNI_PROCESS
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_ADDRESS##*:}
unset JAX_COORDINATOR_ADDRESS XOMNI_PROCESSES XOMNI_PROCESS
exec "$@"
""", "srun"]  # fmt: skip


def local(*command: str, processes: int = 2, devices: int = 2, **variables: str) -> subprocess.Popen:
    """launch/local.py with a command, its output and errors together."""
    start = [*LOCAL, "--processes", str(processes), "--devices", str(devices), "--", *command]
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(**variables))


def environment(**variables: str) -> dict[str, str]:
    """Of a process of a run; what a test of one process has set is left out."""
    return dict(
        {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}, PYTHONPATH=str(ROOT), XOMNI_START_TIMEOUT="120", **variables
    )


def ended(process: subprocess.Popen, timeout: float = 900) -> str:
    """What it has printed, once it has ended."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


def config_file(folder: Path, body: str) -> str:
    """--config=FILE whose get_config() ends with `body`."""
    path = folder / "config.py"
    path.write_text(body)
    return f"--config={path}"
