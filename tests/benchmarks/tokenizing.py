"""Images per second of `xomni data tokenize`, from files to shards, against the jitted encoder alone at the same batch."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, machine_line
from xomni_jax.core.tables import aligned
from xomni_jax.data.rendered import SIGNS
from xomni_jax.pipeline import XOmni
from xomni_jax.sharding.arrays import batch_sharding
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.tokenize_data import Shard, TokenizeConfig, encode_shards

IMAGES, BATCH, SHARD = 512, 16, 128


def run(model: str, repeats: int, seconds: float) -> Report:
    """Times pairs of both, each over all images, after one that compiles: up to `repeats` within about `seconds`, at least three."""
    others = machine.Others()
    loaded = XOmni(model, make_mesh({"data": -1}, jax.local_devices()))
    side = min(loaded.preprocess_config.long_size, 512)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", side)
        pairs = [pair(loaded, Path(folder), side)]
        end = time.perf_counter() + seconds
        while len(pairs) <= repeats and (len(pairs) < 4 or time.perf_counter() < end):
            pairs.append(pair(loaded, Path(folder), side))
    job, bare = (IMAGES / np.array(column) for column in zip(*pairs[1:]))
    ratio = job / bare
    rows = [
        ("", "images/s", "slowest", "fastest"),
        *((name, f"{np.median(x):.4g}", f"{x.min():.4g}", f"{x.max():.4g}") for name, x in (("tokenize", job), ("bare encoder", bare))),
        ("tokenize / bare", f"{np.median(ratio):.3f}", f"{ratio.min():.3f}", f"{ratio.max():.3f}"),
    ]
    lines = [
        f"tokenize: {IMAGES} JPEG images of {side}x{side} pixels, {BATCH} at a time on each device, shards of {SHARD}, with {model}",
        machine_line(f"{machine.cores()} cores", others.cores()),
        "",
        aligned(rows),
        "",
        f"Medians of {len(ratio)} pairs. The encoder alone has its pixels on the device; the job reads files, scales, encodes and writes.",
    ]
    data = {"benchmark": "tokenize", "images": IMAGES, "side": side, "batch": BATCH, "job_per_second": job.tolist()}
    data |= {"bare_per_second": bare.tolist(), "ratio": float(np.median(ratio)), "versions": machine.versions(OURS)}
    return Report("\n".join(lines), data | {"machine": machine.describe()})


def write_images(folder: Path, side: int) -> None:
    """JPEG files of smooth noise, with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        blocks = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        blocks.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{n:05}.jpg", quality=90)
        (folder / f"{n:05}.txt").write_text(f"noise number {n}")


def pair(model: XOmni, folder: Path, side: int) -> tuple[float, float]:
    """Seconds of the whole job, and of the encoder alone."""
    data = SIGNS.updated({"source": "files", "path": str(folder / "images"), "sizes": ((side, side),)}, "config.data")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        shards = [Shard(Path(out) / f"codes-{n:05}.array_record", range(n, n + SHARD)) for n in range(0, IMAGES, SHARD)]
        options = TokenizeConfig(out, batch=BATCH)
        began = time.perf_counter()
        encode_shards(model, data.epoch(), data.sizes, shards, shards, options, np.dtype("<u2"))
        job = time.perf_counter() - began
    rows = BATCH * model.num_data_shards
    pixels = jax.device_put(np.zeros((rows, side, side, 3), np.float32), batch_sharding(model.mesh))
    began = time.perf_counter()
    for _ in range(IMAGES // rows):
        codes = model.encode_pixels(pixels)
    jax.block_until_ready(codes)
    return job, time.perf_counter() - began
