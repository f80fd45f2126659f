"""Start a real service as a user would, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def command(*args: str) -> list[str]:
    """The command line of `xomni serve-reward ...`."""
    return [sys.executable, "-m", "xomni_jax.cli.main", "serve-reward", *args]


@contextmanager
def service(*args: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A service that has said it is ready: (process, url). Ended afterwards."""
    process = subprocess.Popen(
        command(*args, "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"ready on (https?://\S+);", line)
        assert found, f"no ready line but {line!r}; {process.stderr.read() if not line else ''}"
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> set[int]:
    """Direct children of a process."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return {int(p) for p in listing.split()}


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
