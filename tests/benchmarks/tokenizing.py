"""Images per second of `xomni data tokenize`, from files to shards, against the jitted encoder alone at the same batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, machine_line
from tests.benchmarks.timing import Case, measure, unequal_share
from xomni_jax.core.tables import aligned
from xomni_jax.data.codes import unpacked
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import SIGNS
from xomni_jax.pipeline import XOmni
from xomni_jax.sharding.arrays import batch_sharding
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.tokenize_data import Shard, TokenizeConfig, encode_shards

IMAGES, BATCH, SHARD = 512, 16, 128


def run(model: str, repeats: int, seconds: float) -> Report:
    """Compares the codes of both, then times pairs of them, each over all images."""
    others = machine.Others()
    loaded = XOmni(model, make_mesh({"data": -1}, jax.local_devices()))
    side = min(loaded.preprocess_config.long_size, 512)
    with tempfile.TemporaryDirectory(prefix="xomni-bench-tokenize-") as folder:
        write_images(Path(folder) / "images", side)
        result = measure(case(loaded, Path(folder), side), repeats, seconds)
    found, ratios, told = result.as_json(), result.ratios, others.cores()
    rows = [("", "images/s"), ("tokenize", f"{found['rate']['ours']:.4g}"), ("bare encoder", f"{found['rate']['peer']:.4g}")]
    lines = [
        f"tokenize: {IMAGES} JPEG images of {side}x{side} pixels, {BATCH} at a time on each device, shards of {SHARD}, with {model}",
        machine_line(f"{machine.cores()} cores", told),
        "",
        aligned(rows),
        "",
        f"tokenize / bare: {result.ratio:.3f} ({ratios.min():.3f} to {ratios.max():.3f}), by CPU time {result.cpu_ratio:.3f}; "
        f"medians of {len(ratios)} pairs.",
        "The encoder alone has the same pixels on the device; the job reads files, scales, encodes and writes.",
    ]
    data = {"benchmark": "tokenize", "images": IMAGES, "side": side, "batch": BATCH, "result": found, "other_programs_cores": told}
    return Report("\n".join(lines), data | {"versions": machine.versions(OURS), "machine": machine.describe()})


def write_images(folder: Path, side: int) -> None:
    """JPEG files of smooth noise, with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        blocks = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        blocks.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{n:05}.jpg", quality=90)
        (folder / f"{n:05}.txt").write_text(f"noise number {n}")


def case(model: XOmni, folder: Path, side: int) -> Case:
    """The whole job, whose codes are in the folder that it returns, and the encoder alone."""
    data = SIGNS.updated({"source": "files", "path": str(folder / "images"), "sizes": ((side, side),)}, "config.data")
    rows, dtype = BATCH * model.num_data_shards, np.dtype("<u2")
    images = np.stack([to_pixels(example["image"]) for example in data.epoch()])
    pixels = [jax.device_put(images[n : n + rows], batch_sharding(model.mesh)) for n in range(0, IMAGES, rows)]

    def job() -> Path:
        out = Path(tempfile.mkdtemp(dir=folder))
        shards = [Shard(out / f"codes-{n:05}.array_record", range(n, n + SHARD)) for n in range(0, IMAGES, SHARD)]
        encode_shards(model, data.epoch(), data.sizes, shards, shards, TokenizeConfig(str(out), batch=BATCH), dtype)
        return out

    def bare() -> np.ndarray:
        codes = [model.encode_pixels(batch) for batch in pixels]
        return np.concatenate(jax.block_until_ready(codes))

    def differ(out: Path, codes_BYX: np.ndarray) -> float:
        records = ArrayRecordDataSource(sorted(out.glob("*.array_record")))
        return unequal_share(np.stack([unpacked(record, dtype)["codes"] for record in records]), codes_BYX)

    return Case("tokenize", job, bare, differ, 0.0, IMAGES, "images")
