"""Services started and ended around a measurement, as a user starts them."""

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
        started = [(name, *stack.enter_context(process("serve-reward", name, "--workers", str(n)))) for name, n in workers.items()]
        yield {name: url_of(name, started_one, errors) for name, started_one, errors in started}


@contextmanager
def process(*words: str):
    """A process of `xomni WORDS --port 0`, and a file of what it says on stderr."""
    command = [sys.executable, "-m", "xomni_jax.cli.main", *words, "--port", "0"]
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield running, errors
        finally:
            running.terminate()  # in good order: it ends its workers
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
            running.stdout.close()


def url_of(name: str, process: subprocess.Popen, errors) -> str:
    """The address of a service, once it is ready. BenchError when it does not start."""
    for line in process.stdout:
        if found := re.search(r"ready on (http://\S+);", line):
            return found[1]
    process.wait()
    errors.seek(0)
    said = errors.read().strip().splitlines()
    raise BenchError(f"the service {name} did not start: {said[-1] if said else f'exit code {process.returncode}'}")
