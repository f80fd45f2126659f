"""Ahead-of-time compilation with a cache of its results.

JAX's compilation cache needs the devices. This one keeps, instead of the program, its optimised HLO text and its memory analysis, under a
hash of the StableHLO text, the topology, the options and the versions of jax, jaxlib and libtpu.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax

from xomni_jax.planner.chips import GIB, Topology

# Keeps large products with sharded weights from becoming loops of permutes, in which the gathers of weights cannot be counted.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
PACKAGES = ("jax", "jaxlib", "libtpu")
_SIZE = re.compile(r"([\d.]+)([KMGT])")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The analysis of a compiled program.

    Attributes:
      key: of its entry in the cache. jaxpr: of the traced program.
      memory: bytes of a device by kind (arguments, outputs, temporaries, aliased), and the peak, which must fit.
      hlo: the optimised HLO text.
      needs: bytes that the compiler named where the program does not fit; then memory and hlo are None.
      seconds: that the compilation took.
    """

    key: str
    jaxpr: Any
    memory: dict[str, int] | None
    hlo: str | None
    needs: int
    seconds: float


def versions(topology: Topology) -> dict[str, str]:
    """Versions of the packages that determine the compiled program."""
    names = PACKAGES if topology.chip else PACKAGES[:2]
    return {name: importlib.metadata.version(name) for name in names}


def compile_program(fn: Any, args: tuple[Any, ...], mesh: jax.sharding.Mesh, topology: Topology, cache: Path) -> Compiled:
    """Traces, lowers and compiles a jitted function for a topology, or reads the result from the cache.

    Raises:
      ValueError: the compiler refuses the program for a reason other than its size.
    """
    platform = {} if topology.chip is None else {"lowering_platforms": ("tpu",)}
    options = OPTIONS if topology.chip else {}
    with jax.set_mesh(mesh):
        traced = fn.trace(*args)
        lowered = traced.lower(**platform)
        key = _key(lowered.as_text(), topology, options)
        entry_file, hlo_file = cache / f"{key}.json", cache / f"{key}.hlo.gz"
        if entry_file.is_file():
            entry = json.loads(entry_file.read_text())
            hlo = gzip.decompress(hlo_file.read_bytes()).decode() if entry["memory"] else None
            return Compiled(key, traced.jaxpr, hlo=hlo, **entry)
        began = time.perf_counter()
        memory, hlo, needs = _compile(lowered, options)
    entry = {"memory": memory, "needs": needs, "seconds": time.perf_counter() - began}
    cache.mkdir(parents=True, exist_ok=True)
    if hlo is not None:
        hlo_file.write_bytes(gzip.compress(hlo.encode(), 6))
    part = entry_file.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(entry))
    part.replace(entry_file)  # last, since the entry exists from here on
    return Compiled(key, traced.jaxpr, hlo=hlo, **entry)


def _compile(lowered: Any, options: dict[str, str]) -> tuple[dict[str, int] | None, str | None, int]:
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) or "vmem" in str(e).lower():
            raise ValueError(f"the compiler refuses the program: {str(e).strip().splitlines()[0]}") from e
        return None, None, needed(str(e))
    m = compiled.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
    }
    # The compiler's peak counts an array that goes to on-chip memory and back twice, and may exceed what is allocated.
    allocated = sizes["arguments"] + sizes["outputs"] + sizes["temporaries"] - sizes["aliased"]
    peak = min(getattr(m, "peak_memory_in_bytes", 0) or allocated, allocated)
    return {**sizes, "peak": peak}, compiled.as_text(), 0


def needed(message: str) -> int:
    """Bytes that the compiler's out-of-memory message names; 0 where it names none."""
    found = _SIZE.findall(message.split("exceeds available")[0].split("Exceeded")[0])
    unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(max((float(n) * unit[u] for n, u in found), default=0))


def _key(text: str, topology: Topology, options: dict[str, str]) -> str:
    environment = json.dumps([topology.name, options, versions(topology)], sort_keys=True)
    return hashlib.sha256((environment + text).encode()).hexdigest()[:24]
