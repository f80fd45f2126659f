"""What an operator wants to know of a run: where the weights lie, how fast it is, what it compiles, how full the memory is."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xomni_jax.core.config import ConfigError
from xomni_jax.core.flops import count

LARGE = 1 << 20  # bytes of an array that gets a line at start-up, the five largest in any case
BY_ACCIDENT = 0.02  # share of the parameter bytes that may lie whole on every device of a split mesh
# What lies whole by design: vectors, of which splitting saves nothing; the codebook, whose rows are looked up anywhere; and the maps of a
# time or a pooled text, whose input is one vector.
BY_DESIGN = re.compile(r".*/(scale|bias)|(.*/)?codebook|(.*/)?(time|guidance|pooled)_embed/in/kernel")

# Dense bfloat16 peak of a device by `device_kind`, FLOP/s, as published; a CPU has none.
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # of each of a chip's two devices
}  # fmt: skip


# ---- placement ----
def placement(params: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """A line for every large weight: path, shape, spec, bytes on each device.

    Raises:
      ConfigError: on a mesh with fsdp > 1 more than 2 % of the bytes lie whole on every device.
    """
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    leaves.sort(key=lambda leaf: -leaf[1].nbytes)
    lines = [
        f"  {name} {'x'.join(map(str, x.shape))} {x.dtype} {getattr(x.sharding, 'spec', x.sharding)} {size(local_bytes(x))} a device"
        for i, (name, x) in enumerate(leaves)
        if i < 5 or x.nbytes >= LARGE
    ]
    total = sum(x.nbytes for _, x in leaves)
    lines.append(f"  in all {len(leaves)} arrays, {size(total)}, {size(sum(local_bytes(x) for _, x in leaves))} a device")
    whole = [(name, x) for name, x in leaves if local_bytes(x) == x.nbytes and not BY_DESIGN.fullmatch(name)]
    lost = sum(x.nbytes for _, x in whole)
    if mesh.shape["fsdp"] > 1 and total and lost > BY_ACCIDENT * total:
        raise ConfigError(
            f"{lost / total:.1%} of the parameters' bytes lie whole on every device, first {whole[0][0]}{tuple(whole[0][1].shape)} "
            f"(limit {BY_ACCIDENT:.0%} where config.mesh.fsdp={mesh.shape['fsdp']}); name an axis of it that sharding.rules splits"
        )
    return lines


def local_bytes(x: jax.Array) -> int:
    """Bytes of an array on one device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


# ---- speed and memory ----
class FlopCount:
    """Counts the matrix products of jitted functions as they are called: `fn = count(jax.jit(f))`.

    The count is that of the program: causal attention in full, and with remat what the backward pass computes again.
    """

    def __init__(self):
        self.total = 0.0

    def __call__(self, fn: Any) -> Callable[..., Any]:
        """The same function; its program is looked through at the first call."""
        flops = None

        def counted(*args: Any) -> Any:
            nonlocal flops
            if flops is None:
                flops = count(fn.trace(*args).jaxpr).total
            self.total += flops
            return fn(*args)

        return counted


class Meter:
    """Rates between two logged steps.

    perf/goodput: share of the time since the loop began that went into steps: not into restoring, compiling, saving or images.
    perf/tflops_device: counted operations (see `FlopCount`) per second and device; perf/mfu: the same as a share of the device's published
    bfloat16 peak, left out where that is unknown. memory/: of this host's first device, left out where it does not tell (CPU).
    """

    def __init__(self, flops: Callable[[], float]):
        self._flops, self._counted = flops, 0.0
        self._began, self._lost = time.perf_counter(), 0.0
        self._peak = PEAK.get(jax.devices()[0].device_kind)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it time goes into something else than steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lost += time.perf_counter() - began

    def scalars(self, seconds: float, compiling: float) -> dict[str, float]:
        """Metrics over the `seconds` since the last call; `compiling`: seconds spent on it since the beginning, outside `aside`."""
        elapsed = time.perf_counter() - self._began
        out = {"perf/goodput": max(0.0, 1.0 - (self._lost + compiling) / elapsed)}
        flops, self._counted = self._flops() - self._counted, self._flops()
        if flops:
            rate = flops / seconds / jax.device_count()
            out["perf/tflops_device"] = rate / 1e12
            if self._peak:
                out["perf/mfu"] = rate / self._peak
        stats = jax.local_devices()[0].memory_stats() or {}
        names = {"bytes_in_use": "memory/in_use_gb", "peak_bytes_in_use": "memory/peak_gb", "bytes_limit": "memory/limit_gb"}
        return out | {ours: stats[theirs] / 1e9 for theirs, ours in names.items() if theirs in stats}


# ---- compiling ----
class CompileLog:
    """Context that hears what is compiled: a run that still does after its first steps has shapes that change, minutes a time on a pod."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.seconds, self._names = 0.0, []

    def __enter__(self) -> CompileLog:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, seconds: float, **what: Any) -> None:
        if event == self.EVENT:
            self.seconds += seconds
            self._names.append(f"{what.get('fun_name', 'a program')} {seconds:.1f} s")

    def since(self) -> list[str]:
        """What was compiled since the last call."""
        names, self._names = self._names, []
        return names


# ---- profile ----
class Profile:
    """A trace of some steps in a folder, for xprof or TensorBoard; every process writes its own."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def before(self, step: int) -> None:
        """Starts before the first of the steps, numbered from 1."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Ends after the last, once the devices have made it."""
        if self._on and step == self._steps[1]:
            jax.block_until_ready(result)
            self.close()
            say(f"profile of steps {self._steps[0]}-{self._steps[1]} in {self._folder}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def say(text: str) -> None:
    """Prints for the whole run: process 0 alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def profile_range(text: str) -> tuple[int, int]:
    """ "A-B" -> (A, B), steps numbered from 1. Raises ConfigError."""
    first, dash, last = text.partition("-")
    if not dash or not first.isdigit() or not last.isdigit() or not 1 <= int(first) <= int(last):
        raise ConfigError(f"--profile-steps {text}: give two step numbers, such as 3-8")
    return int(first), int(last)
