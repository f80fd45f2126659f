"""Reward services started and ended around a measurement, as a user starts them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tests.benchmarks.timing import BenchError


@contextmanager
def running(workers: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """Starts `xomni serve-reward NAME` on free ports, with so many workers each, side by side: {name: url} once all are ready.

    Raises:
      BenchError: a service does not start; repeats what it said.
    """
    with ExitStack() as stack:
        started = [(name, *stack.enter_context(_process(name, n))) for name, n in workers.items()]
        yield {name: _url(name, process, errors) for name, process, errors in started}


@contextmanager
def _process(name: str, workers: int):
    command = [sys.executable, "-m", "xomni_jax.cli.main", "serve-reward", name, "--port", "0", "--workers", str(workers)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield process, errors
        finally:
            process.terminate()  # in good order: it ends its workers
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _url(name: str, process: subprocess.Popen, errors) -> str:
    for line in process.stdout:
        if found := re.search(r"ready on (http://\S+);", line):
            return found[1]
    process.wait()
    errors.seek(0)
    said = errors.read().strip().splitlines()
    raise BenchError(f"the reward service {name} did not start: {said[-1] if said else f'exit code {process.returncode}'}")
