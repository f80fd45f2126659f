"""How much memory and time a conversion, an export and a comparison take, against a plain copy of the same bytes."""

from __future__ import annotations

import hashlib
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

# A process of its own: peak memory is that of one action and of nothing else. VmHWM counts mapped pages of the files too.
PROGRAM = """
import json, os, sys, time
from tests.benchmarks.convert import peak_bytes
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export
from xomni_jax.checkpoint.inspection import compare, open_view
import jax
jax.devices()
start, began = peak_bytes(), time.perf_counter()
ACTION
os.sync()
print(json.dumps({"seconds": time.perf_counter() - began, "start": start, "peak": peak_bytes(), "said": said}))
"""
ACTIONS = {
    "conversion, with sha256": "said = convert(sys.argv[1], None, sys.argv[2], say=lambda line: None)",
    "export": "said = export(sys.argv[1], sys.argv[2], say=lambda line: None)",
    "inspect --diff": "said = [str(d) for d in compare(open_view(sys.argv[1]), open_view(sys.argv[2]))]",
}
CONVERSION, EXPORT, DIFF = ACTIONS


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
        if (free := shutil.disk_usage(work).free) < 4.2e9 * gigabytes:
            raise BenchError(f"{work}: needs about {4.2 * gigabytes:.1f} GB for a while, {free / 1e9:.1f} GB are free; give another --dir")
        write_released(work / "released", parts)
        files = [p for p in (work / "released").rglob("*") if p.suffix in (".safetensors", ".pth")]
        nbytes = sum(p.stat().st_size for p in files)
        others, copies, hashes, runs = machine.Others(), [], [], {name: [] for name in ACTIONS}
        released, model, exported = work / "released", work / "model", work / "exported"
        end = time.perf_counter() + seconds
        while not copies or (len(copies) < repeats and time.perf_counter() < end):
            shutil.rmtree(model, ignore_errors=True)
            copies.append(_copy(released, work / "copy"))
            hashes.append(_hash(files))
            runs[CONVERSION].append(_run(CONVERSION, released, model))
            runs[EXPORT].append(_run(EXPORT, model, exported))
            runs[DIFF].append(_run(DIFF, exported, model))
            shutil.rmtree(exported)
        busy = others.cores()
        if different := runs[DIFF][-1]["said"]:
            raise BenchError(f"{different[0]} between the export and the model; nothing is reported")
        equal = _check(released, model)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _report(parts, nbytes, copies, hashes, runs, equal, busy)


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


def _hash(files: list[Path]) -> float:
    """Seconds of the hash alone, on one core."""
    began = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            hashlib.file_digest(file, "sha256")
    return time.perf_counter() - began


def _run(action: str, source: Path, target: Path) -> dict[str, Any]:
    os.sync()
    program = PROGRAM.replace("ACTION", ACTIONS[action])
    done = subprocess.run([sys.executable, "-c", program, str(source), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{action} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _check(released: Path, model: Path) -> int:
    """Compares every value; the number of parameters."""
    from xomni_jax.checkpoint.inspection import compare, open_view

    a, b = open_view(released), open_view(model)
    wrong = next(compare(a, b), None)
    if wrong is not None:
        raise BenchError(f"{wrong.name} is not what the checkpoint holds (max abs {wrong.absolute:g}); nothing is reported")
    return sum(map(len, b.arrays.values()))


def _report(
    parts: Parts,
    nbytes: int,
    copies: list[float],
    hashes: list[float],
    runs: dict[str, list[dict[str, Any]]],
    equal: int,
    busy: float | None,
) -> Report:
    largest = _largest(parts)
    limit, peaks = 2 * largest + ALLOWANCE, {name: max(r["peak"] for r in runs[name]) for name in runs}
    times = {"plain copy, to disk": copies, "sha256 alone, one core": hashes}
    times |= {name: [r["seconds"] for r in runs[name]] for name in runs}
    ratios = {name: float(np.median([c / t for c, t in zip(copies, times[name])])) for name in times}
    rows = [("", "seconds", "MB/s", "of the copy", "peak MB")]
    for name, seconds in times.items():
        median = float(np.median(seconds))
        peak = f"{peaks[name] / 1e6:.0f}" if name in peaks else ""
        rows.append((name, duration(median), f"{nbytes / median / 1e6:.0f}", f"{ratios[name]:.2f}", peak))
    start = runs[CONVERSION][0]["start"]
    memory = f"pairs: {len(copies)}; of the peaks {start / 1e6:.0f} MB are there before the first tensor; limit {limit / 1e6:.0f} MB"
    above = [name for name, peak in peaks.items() if peak > limit]
    ratio, bound = ratios[CONVERSION], min(1.0, ratios["sha256 alone, one core"])
    said = [
        f"{'ABOVE' if above else 'within'} the limit of twice the largest tensor ({largest / 1e6:.0f} MB) + 400 MB"
        + "".join(f": {name}" for name in above),
        f"conversion at {ratio:.2f} of a plain copy, {WANTED:g} of the copy or of the hash, whichever is slower, wanted: "
        + ("reached" if ratio >= WANTED * bound else "MISSED"),
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
        "hash_seconds": hashes,
        "runs": runs,
        "ratio": ratio,
        "largest_bytes": largest,
        "limit_bytes": limit,
        "peak_bytes": peaks,
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
