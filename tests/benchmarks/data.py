"""Examples per second of every format of training data, against the bare reader of the library that the format is read with.

Both sides read the same files, decode and resize the same images, and do it with the same number of threads and as far ahead. The bare
reader goes through the files in their order, ours draws at random, as training does.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tests.benchmarks import machine
from tests.benchmarks.report import BUSY, Report, machine_line
from tests.benchmarks.timing import Case, Result, measure, unequal_share
from tests.data import containers
from xomni_jax.core.tables import aligned
from xomni_jax.data.files import FilesConfig, FilesSource

WANTED = 0.8  # of the bare reader's rate
WORKERS, AHEAD = (0, 2), 32  # threads, and the examples that they may be ahead of the one that asks
SIDE, STORED = 256, (512, 384)  # pixels
LIBRARIES = ("grain", "pyarrow", "array_record", "tensorflow-datasets", "pillow")

Stored = tuple[bytes, str]  # an encoded image and its caption


def run(count: int, repeats: int, seconds: float) -> Report:
    """Writes `count` examples in every format into a temporary folder, compares what both sides read, and measures."""
    with tempfile.TemporaryDirectory(prefix="xomni-bench-data-") as folder:
        others, rows = machine.Others(), []
        for name, (write, read) in FORMATS.items():
            path = write(Path(folder) / name, _examples(count))
            began = time.perf_counter()
            source = FilesSource(FilesConfig(path=str(path), sizes=((SIDE, SIDE),)), 0, 1)
            opened = time.perf_counter() - began
            for workers in WORKERS:
                case = _case(f"{name}, {workers}", source, count, workers, lambda read=read, path=path: read(path))
                rows.append((name, workers, opened, measure(case, repeats, seconds / len(FORMATS) / len(WORKERS))))
    return report(count, rows, others.cores())


def report(count: int, measured: Sequence[tuple[str, int, float, Result]], others: float | None) -> Report:
    """The table, and the same as JSON."""
    rows = [("", "threads", "ours", "bare reader", "ours / bare", "by CPU time", "opened in")]
    busy, results = others is not None and others > BUSY, []
    for name, workers, opened, result in measured:
        rate = result.as_json()["rate"]
        told = {"format": name, "threads": workers, "ours": rate["ours"], "bare": rate["peer"], "opened_seconds": opened}
        results.append(told | {"ratio": result.ratio, "cpu_ratio": result.cpu_ratio})
        ratios = f"{result.ratio:.2f}", f"{result.cpu_ratio:.2f}"
        rows.append((name, str(workers), f"{rate['ours']:.0f}/s", f"{rate['peer']:.0f}/s", *ratios, f"{opened:.2f} s"))
    ratio = "cpu_ratio" if busy else "ratio"
    slow = [f"{r['format']} with {r['threads']} threads ({r[ratio]:.2f})" for r in results if r[ratio] < WANTED]
    lines = [
        f"data: {count} images of {STORED[0]} x {STORED[1]} pixels in JPEG, read, decoded, scaled to {SIDE} x {SIDE}",
        machine_line(f"{machine.cores()} cores", others),
        "",
        aligned(rows),
        "",
        f"Below {WANTED} of the bare reader{', by CPU time since the machine was busy' * busy}: {', '.join(slow) or 'none'}.",
        "With 0 threads the one that asks does the work.",
    ]
    data = {"benchmark": "data", "examples": count, "results": results, "versions": machine.versions(LIBRARIES)}
    return Report("\n".join(lines), data | {"other_programs_cores": others, "machine": machine.describe()})


def _case(name: str, source: FilesSource, count: int, workers: int, read: Callable[[], Iterable[Stored]]) -> Case:
    import grain

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=AHEAD if workers else 0)
    dataset = grain.MapDataset.source(source)[:count]  # an epoch

    def ours() -> np.ndarray:
        return _checksums((example["image"], example["caption"]) for example in dataset.to_iter_dataset(options))

    def bare() -> np.ndarray:
        if not workers:
            return _checksums(map(_decoded, read()))
        with ThreadPoolExecutor(workers) as pool:
            return _checksums(_in_threads(pool, read()))

    return Case(name, ours, bare, unequal_share, 0.0, count, "examples")


def _in_threads(pool: ThreadPoolExecutor, stored: Iterable[Stored]) -> Iterator[tuple[np.ndarray, str]]:
    """`_decoded` of each, in order. `pool.map` would read the whole data set into memory first."""
    waiting: deque[Future] = deque()
    for one in stored:
        waiting.append(pool.submit(_decoded, one))
        if len(waiting) == AHEAD:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def _decoded(stored: Stored) -> tuple[np.ndarray, str]:
    image = Image.open(io.BytesIO(stored[0])).convert("RGB")
    return np.asarray(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)), stored[1]


def _checksums(examples: Iterable[tuple[np.ndarray, str]]) -> np.ndarray:
    """One number for each example, in an order that does not depend on that of the examples."""
    return np.sort([int(image[::16, ::16].sum()) * 1000 + sum(caption.encode()) for image, caption in examples])


def _examples(count: int) -> Iterator[Stored]:
    rng = np.random.default_rng(0)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(STORED, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue(), f"a sign with the number {n}"


# ---- a writer and a bare reader of each format ----
def _write_lines(folder: Path, examples: Iterable[Stored]) -> Path:
    folder.mkdir()
    rows = []
    for n, (image, caption) in enumerate(examples):
        (folder / f"{n}.jpg").write_bytes(image)
        rows.append(json.dumps({"image": f"{n}.jpg", "caption": caption}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder / "train.jsonl"


def _read_lines(path: Path) -> Iterator[Stored]:
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            yield (path.parent / row["image"]).read_bytes(), row["caption"]


def _write_parquet(folder: Path, examples: Iterable[Stored]) -> Path:
    folder.mkdir()
    rows = [{"image": {"bytes": image, "path": None}, "caption": caption} for image, caption in examples]
    return containers.write_parquet(folder / "train.parquet", rows, group=100)


def _read_parquet(path: Path) -> Iterator[Stored]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(100):
        for row in batch.to_pylist():
            yield row["image"]["bytes"], row["caption"]


def _write_tar(folder: Path, examples: Iterable[Stored]) -> Path:
    folder.mkdir()
    samples = (containers.sample(f"{n:06d}", image=image, text=caption) for n, (image, caption) in enumerate(examples))
    return containers.write_tar(folder / "00000.tar", [member for sample in samples for member in sample])


def _read_tar(path: Path) -> Iterator[Stored]:
    with tarfile.open(path) as tar:
        while (image := tar.next()) is not None:
            data = tar.extractfile(image).read()
            yield data, tar.extractfile(tar.next()).read().decode()


def _write_array_record(folder: Path, examples: Iterable[Stored]) -> Path:
    folder.mkdir()
    rows = [{"image": image, "caption": caption} for image, caption in examples]
    return containers.write_array_record(folder / "train.array_record", rows)


def _read_array_record(path: Path) -> Iterator[Stored]:
    import msgspec
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for record in ArrayRecordDataSource([str(path)]):
        row = msgspec.msgpack.decode(record)
        yield row["image"], row["caption"]


def _write_tfds(folder: Path, examples: Iterable[Stored]) -> Path:
    from tensorflow_datasets import features

    made = features.FeaturesDict({"image": features.Image(), "caption": features.Text()})
    return containers.write_tfds(folder, made, [[{"image": image, "caption": caption} for image, caption in examples]])


def _read_tfds(path: Path) -> Iterator[Stored]:
    import tensorflow_datasets as tfds

    for row in tfds.builder_from_directory(path).as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()}):
        yield row["image"], row["caption"].decode()


FORMATS: dict[str, tuple[Callable[[Path, Iterable[Stored]], Path], Callable[[Path], Iterable[Stored]]]] = {
    "jsonl": (_write_lines, _read_lines),
    "parquet": (_write_parquet, _read_parquet),
    "webdataset": (_write_tar, _read_tar),
    "array_record": (_write_array_record, _read_array_record),
    "tfds": (_write_tfds, _read_tfds),
}
