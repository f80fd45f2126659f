"""Images to codes once, for all later training: the job of `xomni data tokenize`. What it writes is described in `data.codes`.

Records of the source are dealt to shards by their number, and shards to processes, which need not know of each other. A finished shard is
never touched again, so that a job may be killed at any time and goes on with the same command, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from xomni_jax.checkpoint.store import fingerprint, write_json
from xomni_jax.core.config import ConfigError, flat
from xomni_jax.core.folders import check_folder, part_of, why_taken, write_text
from xomni_jax.core.tables import bytes_text
from xomni_jax.data.codes import INDEX, REJECTED, SETTINGS, code_dtype, packed, write_shard
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.sources import ENDLESS, Example, Examples
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import Batch, run_batches
from xomni_jax.sharding.arrays import batch_sharding
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.components import open_model, tokenizer_of
from xomni_jax.training.stage import RunConfig

_AT_ONCE = 4  # records that a thread reads: to hand over each alone costs half as much as to read it


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """How the images of a source become codes.

    Attributes:
      out: folder of the codes
      batch: images at a time on each device
      shard: records of the source in each file
      max_rejected: stop when more records than this cannot be used: a number, or a share of all such as 1%
      threads: that read images
    """

    out: str
    batch: int = 16
    shard: int = 4096
    max_rejected: str = "10%"
    threads: int = 16

    def __post_init__(self):
        for name in ("batch", "shard", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")
        self.limit(1)

    def limit(self, records: int) -> float:
        """The most of `records` that may be rejected."""
        number = self.max_rejected.removesuffix("%")
        try:
            value = float(number)
            if value >= 0:
                return value / 100 * records if number != self.max_rejected else value
        except ValueError:
            pass
        raise ConfigError(f"--max-rejected {self.max_rejected}: give a number of records, such as 100, or a share of them, such as 1%")


class TooManyRejected(ValueError):
    """More records than allowed cannot be used."""


@dataclasses.dataclass
class Shard:
    """Records of one file.

    Attributes:
      keys: their numbers in the source.
      examples, sizes, codes: of those that could be used, by key; sizes are (height, width) in pixels.
      rejected: {key: reason} of the others.
    """

    path: Path
    keys: range
    examples: dict[int, Example] = dataclasses.field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    codes: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    rejected: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What is known of the finished file; None until there is one."""
        try:
            summary = json.loads(self.path.with_suffix(".json").read_text())
            return summary if self.path.stat().st_size == summary["bytes"] else None
        except (OSError, ValueError):
            return None

    def write(self, dtype: np.dtype) -> None:
        """Writes the file and then, as the sign that it is whole, its summary. Records of one size lie together, ordered by key."""
        sizes = defaultdict(list)
        for key in sorted(self.codes):
            sizes[self.sizes[key]].append(key)
        part = part_of(self.path)
        write_shard(part, (packed(key, self.examples[key], self.codes[key], dtype) for keys in sizes.values() for key in keys))
        with part.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(part, self.path)
        counts = [(*size, len(keys)) for size, keys in sizes.items()]
        about = {"file": self.path.name, "records": len(self.codes), "bytes": self.path.stat().st_size, "sha256": digest, "sizes": counts}
        rejected = [{"key": key, "reason": reason} for key, reason in sorted(self.rejected.items())]
        write_json(self.path.with_suffix(".json"), about | held_fields(self.examples.values()) | {"rejected": rejected})
        self.examples.clear()  # a data set may be larger than the memory
        self.codes.clear()


def held_fields(examples: Iterable[Iterable[str]]) -> dict[str, list[str]]:
    """`fields`: the names of what all examples hold; `offered`: of what any of them holds."""
    held = [set(example) for example in examples] or [set()]
    return {"fields": sorted(set.intersection(*held)), "offered": sorted(set.union(*held))}


def tokenize(cfg: RunConfig, options: TokenizeConfig, process: int = 0, processes: int = 1) -> str:
    """Makes the codes of this process's shards; the process that finishes the last shard writes the index. Returns a line that says so.

    Args:
      process, processes: index of this process, and how many share the work.

    Raises:
      ConfigError: the data, the model or the folder do not fit.
      TooManyRejected: see `TokenizeConfig.max_rejected`; the folder's rejected.jsonl lists them.
    """
    out, records = Path(options.out), cfg.data.epoch()
    count = min(cfg.data.first or len(records), len(records))
    if count >= ENDLESS:
        raise ConfigError(
            f"config.data.source={cfg.data.source}: its examples have no end; name files, or take the first with --config.data.first=N"
        )
    if reason := why_taken(out, "data set of codes"):
        raise ConfigError(f"--out {out} {reason}; name another folder")
    name = tokenizer_of(cfg.init_from)
    model = open_model(cfg.init_from, (name,), make_mesh({"data": -1}, jax.local_devices()), "data tokenize")
    tokens = max(math.prod(model.grid(*size)) for size in cfg.data.sizes)
    vq = model.config(name)
    dtype = code_dtype(vq.codebook_size)
    check_folder(out, count * tokens * dtype.itemsize)
    settings = {
        "data": json.loads(json.dumps(cfg.data.as_dict())),
        "digest": getattr(records, "digest", ""),
        "records": count,
        "model": cfg.init_from,
        "tokenizer": fingerprint(name, model.params(name), vq),
        "codebook_size": vq.codebook_size,
        "dtype": dtype.str,
        "batch": options.batch,
        "shard": options.shard,
    }
    claim(out, settings)
    total = -(-count // options.shard)
    shards = [
        Shard(out / f"codes-{n:05}-of-{total:05}.array_record", range(n * options.shard, min((n + 1) * options.shard, count)))
        for n in range(total)
    ]
    encode_shards(model, records, cfg.data.sizes, shards, shards[process::processes], options, dtype)
    return write_index(out, settings, shards)


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes FOLDER/source.json, or refuses settings that differ from those that it holds."""
    path = out / SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, settings)
    try:
        old, new = flat(json.loads(path.read_text())), flat(settings)
    except ValueError:
        raise ConfigError(f"{path} is damaged; delete the folder, or name another one") from None
    for key in sorted((old.keys() | new.keys()) - {"model"}):  # a model is known by its tokenizer, wherever it lies
        if old.get(key) != new.get(key):
            raise ConfigError(f"--out {out}: was begun with {key}={old.get(key)!r}, now it is {new.get(key)!r}; name another folder")


def encode_shards(
    model: XOmni,
    records: Examples,
    sizes: Sequence[tuple[int, int]],
    shards: Sequence[Shard],
    own: Sequence[Shard],
    options: TokenizeConfig,
    dtype: np.dtype,
) -> None:
    """Makes and writes those of `own` shards that are not there yet: while the devices encode, images are read and shards are written."""
    rejected = [line for shard in shards if (summary := shard.summary) for line in summary["rejected"]]
    missing = [shard for shard in own if not shard.summary]
    room = options.limit(sum(len(shard.keys) for shard in shards)) - len(rejected)
    count = sum(len(shard.keys) for shard in own)
    left = sum(len(shard.keys) for shard in missing)
    try:
        with (
            tqdm(total=count, initial=count - left, desc="tokenize", unit="image", dynamic_ncols=True) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            writing = None
            for shard in encoded(model, loaded(records, sizes, missing, options.threads), missing, options.batch, room, bar):
                if writing:
                    writing.result()  # raises what went wrong
                writing = writer.submit(shard.write, dtype)
            if writing:
                writing.result()
    except TooManyRejected as error:
        rejected += [{"key": key, "reason": reason} for shard in missing for key, reason in shard.rejected.items()]
        path = write_rejected(shards[0].path.parent, rejected)
        told = f"{len(rejected)} records cannot be used, --max-rejected {options.max_rejected} allows fewer"
        raise TooManyRejected(f"{told}; {path} lists them, the last: {error}") from None


def loaded(records: Examples, sizes: Sequence[tuple[int, int]], shards: Sequence[Shard], threads: int) -> Iterator[tuple]:
    """(example without its image, pixels, "") of every record in order, or (None, None, why it cannot be used)."""

    def load(key: int) -> tuple[Example | None, np.ndarray | None, str]:
        try:
            example = dict(records[key])
        except (ValueError, OSError) as error:
            return None, None, str(error)
        image = example.pop("image", None)
        if image is None:
            return None, None, "it has no image"
        if example.get("turns") and len(example.get("images", ())) > 1:
            return None, None, "a conversation that shows several images, of which codes hold one; train on the images themselves"
        if image.shape[:2] not in sizes:
            return None, None, f"an image of {image.shape[0]}x{image.shape[1]} pixels, which is none of config.data.sizes"
        return example, to_pixels(image), ""

    keys = [key for shard in shards for key in shard.keys]
    chunks = grain.MapDataset.range(0, len(keys), _AT_ONCE).map(lambda start: [load(key) for key in keys[start : start + _AT_ONCE]])
    return itertools.chain.from_iterable(chunks.to_iter_dataset(grain.ReadOptions(threads, threads)))


def encoded(model: XOmni, loaded: Iterator[tuple], shards: Sequence[Shard], batch: int, room: float, bar: tqdm) -> Iterator[Shard]:
    """The shards, each as soon as all its codes are there. Batches have one size and one shape, and end with their shard.

    Raises:
      TooManyRejected: more than `room` records cannot be used.
    """
    pixels: dict[int, np.ndarray] = {}
    rows, sharding, waiting = batch * model.num_data_shards, batch_sharding(model.mesh), list(shards)

    def in_batches() -> Iterator[Batch]:
        rejected = 0
        for shard in shards:
            groups: dict[Any, list[int]] = defaultdict(list)
            for key, (example, image, reason) in zip(shard.keys, loaded):
                if reason:
                    shard.rejected[key] = reason
                    rejected += 1
                    bar.update()
                    if rejected > room:
                        raise TooManyRejected(reason)
                    continue
                shard.examples[key], shard.sizes[key], pixels[key] = example, image.shape[:2], image
                group = groups[image.shape]
                group.append(key)
                if len(group) == rows:
                    yield Batch(tuple(group), rows, shard)
                    group.clear()
            yield from (Batch(tuple(group), rows, shard) for group in groups.values() if group)

    def program(batch: Batch) -> jax.Array:
        images = np.stack(batch.take(pixels))
        for key in batch.items:
            del pixels[key]
        return model.encode_pixels(jax.device_put(images, sharding))

    for batch_, codes_BYX in run_batches(program, in_batches()):
        batch_.shape.codes.update(zip(batch_.items, codes_BYX))
        bar.update(len(batch_.items))
        while waiting and complete(waiting[0]):
            yield waiting.pop(0)
    yield from waiting


def complete(shard: Shard) -> bool:
    """Whether every record of a shard has its codes or was rejected."""
    return len(shard.codes) + len(shard.rejected) == len(shard.keys)


def write_rejected(out: Path, rejected: Sequence[dict[str, Any]]) -> Path:
    """Writes FOLDER/rejected.jsonl and returns its path."""
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in sorted(rejected, key=lambda line: line["key"]))
    return write_text(out / REJECTED, "".join(lines))


def write_index(out: Path, settings: dict[str, Any], shards: Sequence[Shard]) -> str:
    """Writes FOLDER/index.json if all shards are finished. Returns a line about the state of the folder."""
    summaries = [summary for shard in shards if (summary := shard.summary)]
    if len(summaries) < len(shards):
        return f"{len(summaries)} of {len(shards)} shards are finished in {out}; the process that finishes the last one writes {INDEX}"
    rejected = [line for summary in summaries for line in summary.pop("rejected")]
    write_rejected(out, rejected)
    full = [summary for summary in summaries if summary["records"]]
    held = {name: ["codes", *held_fields(summary[name] for summary in full)[name]] for name in ("fields", "offered")}
    sizes: dict[tuple[int, int], int] = defaultdict(int)
    for height, width, count in (row for summary in summaries for row in summary["sizes"]):
        sizes[height, width] += count
    examples = sum(sizes.values())
    counts = {"examples": examples, "rejected": len(rejected), "sizes": [(*size, n) for size, n in sizes.items()]}
    for part in out.glob(".codes-*"):  # of processes that were killed
        part.unlink()
    write_json(out / INDEX, settings | counts | held | {"shards": summaries})
    size = bytes_text(sum(summary["bytes"] for summary in summaries))
    listed = f", {len(rejected)} rejected (listed in {REJECTED})" if rejected else ""
    return f"{examples} examples in {len(shards)} shards, {size}{listed}: {out}"
