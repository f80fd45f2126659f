"""What a measurement depends on beside the code: cores, threads, load, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


def cores() -> int:
    """Cores this process may use; both sides get a thread for each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(n: int) -> None:
    """Keeps this process to `n` of its cores, and with it XLA's pool; only before the first computation.

    Raises:
      ValueError: there are fewer, or the system cannot do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"--threads {n}: this system cannot keep a process to some of its cores; leave the option out")
    if not 1 <= n <= cores():
        raise ValueError(f"--threads {n}: this process has {cores()} cores; give a number from 1 to that")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-n:])


def xla_threads() -> int:
    """Threads of XLA's CPU pool, counted where the system lists them (XLA makes one per core and offers no call that says so)."""
    jax.block_until_ready(jax.numpy.zeros(()) + 1)  # the pool exists from the first computation on
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text())
        except OSError:  # a thread that has just ended
            continue
    return sum("XLAEigen" in name for name in names) or cores()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in packages}


def load() -> float | None:
    """Processes that wanted to run, averaged over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Others:
    """How much of the machine other programs take while something is measured. The load average cannot tell: it counts us too."""

    def __init__(self):
        self._began = _cpu_seconds(), time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        """Cores kept busy by other programs since this was made, on average; None where the system does not say."""
        busy, own, now = _cpu_seconds(), time.process_time(), time.perf_counter()
        if busy is None:
            return None
        return round(max(0.0, busy - self._began[0] - (own - self._began[1])) / max(now - self._began[2], 1e-9), 2)


def _cpu_seconds() -> float | None:
    """Processor seconds of all programs since the system started, with what a hypervisor took."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def family() -> dict[int, float]:
    """{process: its processor seconds, to a hundredth} of this process and of all that it has started and that still run; needs /proc."""
    all_of_them = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = file.read_text().partition(" (")
        except OSError:  # a process that has just ended
            continue
        _, parent, *fields = rest.rpartition(") ")[2].split()
        all_of_them[int(pid)] = int(parent), sum(map(int, fields[9:11])) / os.sysconf("SC_CLK_TCK")
    found, parents = {}, {os.getpid()}
    while parents:
        found |= {pid: all_of_them[pid][1] for pid in parents}
        parents = {pid for pid, (parent, _) in all_of_them.items() if parent in parents}
    return found


def memory_and_descriptors(pids: Sequence[int]) -> tuple[float, int]:
    """(megabytes resident, open descriptors) of these processes in all; needs /proc."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def describe() -> dict[str, Any]:
    """Processor, cores, system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": model, "cores": cores(), "system": platform.platform(), "python": platform.python_version()}
