"""What a run reports about itself: placement of the weights, speed, compilations, memory, profiles."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xomni_jax.core.config import ConfigError
from xomni_jax.core.flops import count
from xomni_jax.core.tables import bytes_text
from xomni_jax.sharding.abstract import leaves, shard_bytes

LARGE = 1 << 20  # bytes from which an array gets a line at start-up; the five largest always do
MAX_REPLICATED = 0.02  # share of the parameters' bytes that may be replicated although the mesh splits parameters
# Replicated by design: vectors, where splitting saves little; the codebook, of which every device looks up arbitrary rows; and the
# projections of a time or a pooled text, whose input is one vector. Adapters are split on one side and small.
REPLICATED = re.compile(r".*/(scale|bias)|(.*/)?codebook|(.*/)?(time|guidance|pooled)_embed/in/kernel|.*/lora_[ab]")

# Published peak of dense bfloat16 matrix products by `device_kind`, in FLOP/s. CPUs have no entry.
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
    "TPU v6e": 918e12, "TPU7x": 1153.5e12,  # per device; a chip has two
}  # fmt: skip


# ---- placement ----
def placement(params: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """One line per large weight: path, shape, dtype, partition spec, bytes on each device.

    Raises:
      ConfigError: on a mesh with fsdp > 1, more than 2 % of the bytes are replicated.
    """
    arrays = sorted(leaves(params), key=lambda leaf: -leaf[1].nbytes)
    lines = [
        f"  {name} {'x'.join(map(str, x.shape))} {x.dtype} {getattr(x.sharding, 'spec', x.sharding)} {bytes_text(shard_bytes(x))} a device"
        for i, (name, x) in enumerate(arrays)
        if i < 5 or x.nbytes >= LARGE
    ]
    total = sum(x.nbytes for _, x in arrays)
    lines.append(f"  in all {len(arrays)} arrays, {bytes_text(total)}, {bytes_text(sum(shard_bytes(x) for _, x in arrays))} a device")
    whole = [(name, x) for name, x in arrays if shard_bytes(x) == x.nbytes and not REPLICATED.fullmatch(name)]
    lost = sum(x.nbytes for _, x in whole)
    if mesh.shape["fsdp"] > 1 and total and lost > MAX_REPLICATED * total:
        raise ConfigError(
            f"{lost / total:.1%} of the parameters' bytes are replicated on every device, first {whole[0][0]}{tuple(whole[0][1].shape)} "
            f"(limit {MAX_REPLICATED:.0%} where config.mesh.fsdp={mesh.shape['fsdp']}); name an axis of it that sharding.rules splits"
        )
    return lines


# ---- speed and memory ----
class FlopCount:
    """Counts the matrix products of jitted functions whenever they are called: `fn = count(jax.jit(f))`.

    It counts what the program computes: the masked half of causal attention as well, and with remat what the backward pass recomputes.
    """

    def __init__(self):
        self.total = 0.0

    def __call__(self, fn: Any) -> Callable[..., Any]:
        """The same function; its operations are counted at the first call."""
        flops = None

        def counted(*args: Any) -> Any:
            nonlocal flops
            if flops is None:
                flops = count(fn.trace(*args).jaxpr).total
            self.total += flops
            return fn(*args)

        return counted


class Meter:
    """Metrics of speed and memory between two logged steps.

    perf/goodput: share of the time since the loop began that was spent on steps, rather than on restoring, compiling, saving or images.
    perf/tflops_device: counted operations (see `FlopCount`) per second and device, in 1e12.
    perf/mfu: the same as a share of the device's published bfloat16 peak; only if that is known.
    memory/: of the first device of this host; only if it reports memory (a CPU does not).
    """

    def __init__(self, flops: Callable[[], float]):
        self._flops, self._counted = flops, 0.0
        self._began, self._lost = time.perf_counter(), 0.0
        self._peak = PEAK.get(jax.devices()[0].device_kind)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context whose time does not count as spent on steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lost += time.perf_counter() - began

    def scalars(self, seconds: float, compiling: float) -> dict[str, float]:
        """Metrics over the `seconds` since the last call; `compiling`: seconds of compilation since the beginning, outside `aside`."""
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
    """Context that records compilations: one after the warm-up means that shapes change, which costs minutes each time on a pod."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.seconds, self._names = 0.0, []

    def __enter__(self) -> CompileLog:
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record)

    def _record(self, event: str, seconds: float, **what: Any) -> None:
        if event == self.EVENT:
            self.seconds += seconds
            self._names.append(f"{what.get('fun_name', 'a program')} {seconds:.1f} s")

    def since(self) -> list[str]:
        """Names and durations of the programs that were compiled since the last call."""
        names, self._names = self._names, []
        return names


# ---- profile ----
class Profile:
    """Writes a trace of some steps to a folder, for xprof or TensorBoard. Every process writes its own."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def before(self, step: int) -> None:
        """Starts the trace if `step`, counted from 1, is the first of the steps."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if `step` is the last one, after the devices have computed `result`."""
        if self._on and step == self._steps[1]:
            jax.block_until_ready(result)
            self.close()
            say(f"profile of steps {self._steps[0]}-{self._steps[1]} in {self._folder}")

    def close(self) -> None:
        """Ends a trace that has been started."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def say(text: str) -> None:
    """Prints a text once per run: in process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def profile_range(text: str) -> tuple[int, int]:
    """ "A-B" -> (A, B), steps numbered from 1. Raises ConfigError."""
    first, dash, last = text.partition("-")
    if not dash or not first.isdigit() or not last.isdigit() or not 1 <= int(first) <= int(last):
        raise ConfigError(f"--profile-steps {text}: give two step numbers, such as 3-8")
    return int(first), int(last)
