"""How much memory and time a conversion takes, against a plain copy of the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import machine
from tests.benchmarks.report import Report, duration, machine_line
from tests.benchmarks.synthetic import Parts, released_widths, write_released
from tests.benchmarks.timing import BenchError
from xomni_jax.core.tables import aligned

ALLOWANCE = 400 * 10**6  # bytes beside twice the largest tensor
WANTED = 0.7  # of the copy's speed
COPY_BLOCK = 8 * 2**20

# A process of its own: peak memory is that of a conversion and of nothing else. VmHWM counts mapped pages of the files too.
PROGRAM = """
import json, os, sys, time
from tests.benchmarks.convert import peak_bytes
from xomni_jax.checkpoint.convert import convert
import jax
jax.devices()
start, began = peak_bytes(), time.perf_counter()
warnings = convert(sys.argv[1], None, sys.argv[2], say=lambda line: None)
os.sync()
print(json.dumps({"seconds": time.perf_counter() - began, "start": start, "peak": peak_bytes(), "warnings": warnings}))
"""


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(gigabytes: float, folder: str | None, repeats: int, seconds: float, parts: Parts | None = None) -> Report:
    """Writes a released directory of at least `gigabytes`, copies and converts it in turn, checks every value, removes all.

    Raises:
      BenchError: too little space, or the conversion is not the checkpoint.
    """
    parts = parts or released_widths(int(gigabytes * 1e9))
    work = Path(tempfile.mkdtemp(prefix="xomni-bench-convert-", dir=folder))
    try:
        if (free := shutil.disk_usage(work).free) < 3.2e9 * gigabytes:
            raise BenchError(f"{work}: needs about {3.2 * gigabytes:.1f} GB for a while, {free / 1e9:.1f} GB are free; give another --dir")
        write_released(work / "released", parts)
        files = [p for p in (work / "released").rglob("*") if p.suffix in (".safetensors", ".pth")]
        nbytes = sum(p.stat().st_size for p in files)
        others, copies, runs = machine.Others(), [], []
        end = time.perf_counter() + seconds
        while not runs or (len(runs) < repeats and time.perf_counter() < end):
            copies.append(_copy(work / "released", work / "copy"))
            runs.append(_convert(work / "released", work / f"model{len(runs)}"))
            if len(runs) > 1:
                shutil.rmtree(work / f"model{len(runs) - 2}")
        busy = others.cores()
        equal = _check(work / "released", work / f"model{len(runs) - 1}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _report(parts, nbytes, copies, runs, equal, busy)


def _copy(source: Path, target: Path) -> float:
    """Seconds of a copy that ends when it is on disk, as the conversion's does."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    began, block = time.perf_counter(), memoryview(bytearray(COPY_BLOCK))
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb", buffering=0) as file, open(to, "wb", buffering=0) as out:
            while n := file.readinto(block):
                out.write(block[:n])
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def _convert(source: Path, target: Path) -> dict[str, Any]:
    os.sync()
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(source), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"the conversion failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _check(released: Path, model: Path) -> int:
    """Compares every value; the number of parameters."""
    from xomni_jax.checkpoint.inspection import compare, open_view

    a, b = open_view(released), open_view(model)
    wrong = next(compare(a, b), None)
    if wrong is not None:
        raise BenchError(f"{wrong.name} is not what the checkpoint holds (max abs {wrong.absolute:g}); nothing is reported")
    return sum(map(len, b.arrays.values()))


def _report(parts: Parts, nbytes: int, copies: list[float], runs: list[dict[str, Any]], equal: int, busy: float | None) -> Report:
    largest = _largest(parts)
    limit, peak = 2 * largest + ALLOWANCE, max(r["peak"] for r in runs)
    ours, plain = (float(np.median(x)) for x in ([r["seconds"] for r in runs], copies))
    ratio = float(np.median([c / r["seconds"] for c, r in zip(copies, runs)]))
    rows = [("", "seconds", "MB/s", "pairs"), ("plain copy, to disk", duration(plain), f"{nbytes / plain / 1e6:.0f}", str(len(copies)))]
    rows.append(("conversion, with sha256", duration(ours), f"{nbytes / ours / 1e6:.0f}", str(len(runs))))
    memory = (
        f"peak resident memory {peak / 1e6:.0f} MB, of which {runs[0]['start'] / 1e6:.0f} MB before the first tensor; "
        f"limit {limit / 1e6:.0f} MB"
    )
    said = [
        f"{'within' if peak <= limit else 'ABOVE'} the limit of twice the largest tensor ({largest / 1e6:.0f} MB) + 400 MB",
        f"speed {ratio:.2f} of a plain copy, {WANTED:g} wanted: {'reached' if ratio >= WANTED else 'MISSED'}",
    ]
    c = parts.transformer
    title = f"{nbytes / 1e9:.2f} GB in the released layout: transformer of {c.n_layers} layers, width {c.d_model}; ViT, projector, MMDiT"
    text = "\n".join(
        [
            f"convert: {title}",
            machine_line("one process", busy),
            f"all {equal} parameters equal the files' tensors",
            "",
            aligned(rows),
            "",
            memory,
            *said,
        ]
    )
    data = {
        "benchmark": "convert",
        "title": title,
        "bytes": nbytes,
        "copy_seconds": copies,
        "runs": runs,
        "ratio": ratio,
        "largest_bytes": largest,
        "limit_bytes": limit,
        "peak_bytes": peak,
        "parameters_compared": equal,
        "other_programs_cores": busy,
        "machine": machine.describe(),
        "verdict": said,
    }
    return Report(text, data)


def _largest(parts: Parts) -> int:
    """Bytes of the largest tensor of the files."""
    from tests.benchmarks.synthetic import BF16, F32, tensors
    from xomni_jax.checkpoint.names import mmdit, siglip_vq, transformer

    kinds = {"transformer": (transformer, BF16), "siglip_vq": (siglip_vq, F32), "mmdit": (mmdit, BF16)}
    configs = {name: getattr(parts, name) for name in kinds}
    return max(
        t.nbytes for name, (names, dtype) in kinds.items() for _, t in tensors(name, configs[name], names.table(configs[name]), dtype)
    )
