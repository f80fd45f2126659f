"""Records of files as sources: images with their captions and conversations, and prompts whose images are to be drawn."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from xomni_jax.core.config import ConfigError, NonNegative
from xomni_jax.data.images import UnreadableImage, image_size, read_image
from xomni_jax.data.kinds import Part, open_parts
from xomni_jax.data.records import Columns, Record, make_record
from xomni_jax.data.sources import ENDLESS, BatchOrder, Example
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.data.videos import is_video, read_frame

_READERS, _AT_ONCE = 16, 256  # threads, and the records that each of them takes at a time

Size = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class FilesConfig(Columns):
    """Records in files. `xomni data kinds` lists the kinds of files, `xomni data check` reads them all.

    Attributes:
      path: a file, a folder, a glob, or several of these
      sizes: (height, width) in pixels of the images, multiples of the tokenizer's patch; a record takes the size that is nearest to the
        shape of its image, which is scaled to cover it, and loses what stands out; a prompt takes the first, or its own
      skip_faulty: leave out records that cannot be used, instead of refusing them; every image is then read once at the start
      exclude: whose prompts must not occur among the captions or prompts: files, or suites of xomni eval with the folder of their data, as
        geneval=FOLDER
    """

    path: str | tuple[str, ...] = ""
    sizes: tuple[tuple[int, int], ...] = ()
    skip_faulty: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name a file of records, or a folder of images")
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes={self.sizes} must hold one or more (height, width) in pixels, such as ((1152, 1152),)")


@dataclass(frozen=True)
class PromptsConfig(FilesConfig):
    """Prompts in files.

    Attributes:
      size_weights: how often each of `sizes` is drawn for the prompts that name none; empty: always the first
    """

    size_weights: tuple[NonNegative, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.size_weights and (len(self.size_weights) != len(self.sizes) or not sum(self.size_weights)):
            raise ValueError(f"size_weights={self.size_weights} must hold a weight for each of sizes={self.sizes}, and not only zeros")

    @property
    def shares(self) -> dict[Size, float]:
        """The share of each size among the prompts that name none, without those that never are."""
        weights = self.size_weights or (1.0,)
        return {size: weight / sum(weights) for size, weight in zip(self.sizes, weights) if weight}


class Records:
    """The records of files by number. A number is a position in the files, so that a faulty record does not move the others.

    Attributes:
      notes: what is no record and yet should be listed, a sentence each.
    """

    def __init__(self, paths: str | Sequence[str], how: Columns, prompts: bool):
        self.parts, self.how, self.prompts = open_parts(paths, how.split), how, prompts
        self.ends = list(itertools.accumulate(len(part.rows) for part in self.parts))
        self.notes = [note for part in self.parts for note in part.table.notes]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Record:
        """Raises FaultyRecord when the record cannot be used."""
        part, within = self._part(number)
        row, key = part.rows[within], f"{part.name}:{within}"
        where, root = part.table.where(row), part.table.root
        record = make_record(part.table[row], key, where, root, self.how, prompt=self.prompts, rewards=part.rewards)
        return replace(record, weight=part.weight * record.weight)

    def where(self, number: int) -> str:
        """The place of a record, for messages."""
        part, within = self._part(number)
        return part.table.where(part.rows[within])

    def source(self, number: int) -> str:
        """The name of a record's entry in a list of files; empty where it comes from no list."""
        return self._part(number)[0].source

    def blocks(self) -> np.ndarray | None:
        """For every record the number of those that are read together with it, -1 where it is read alone; None where all are."""
        if not any(hasattr(part.table, "blocks") for part in self.parts):
            return None
        found, count = [], 0
        for part in self.parts:
            blocks = getattr(part.table, "blocks", None)
            found.append(np.full(len(part.rows), -1) if blocks is None else blocks[np.asarray(part.rows)] + count)
            count = max(count, int(found[-1].max(initial=-1)) + 1)
        return np.concatenate(found)

    def _part(self, number: int) -> tuple[Part, int]:
        which = bisect_right(self.ends, number)
        return self.parts[which], number - (self.ends[which] - len(self.parts[which].rows))

    def map(self, function: Callable[[int], T]) -> Iterator[T]:
        """The function's value for every number, in order; several threads run it."""

        def chunk(start: int) -> list[T]:
            return [function(n) for n in range(start, min(start + _AT_ONCE, len(self)))]

        with ThreadPoolExecutor(_READERS) as pool:
            for values in pool.map(chunk, range(0, len(self), _AT_ONCE)):
                yield from values


class Usable(NamedTuple):
    """What a first look at all records of a source finds.

    Attributes:
      members: the numbers of the usable records for each size of images.
      weights: of these records; None where all weigh the same.
      fields: what the examples of all of them hold; `offered`: what those of any hold. Targets and rewards are there by name, such as
        "targets.text".
    """

    records: Records
    members: dict[Size, np.ndarray]
    weights: dict[Size, np.ndarray] | None
    fields: frozenset[str]
    offered: frozenset[str]


class FilesSource:
    """Records with images as a source, shuffled anew in every epoch."""

    Options: ClassVar[type] = FilesConfig
    prompts: ClassVar[bool] = False

    def __init__(self, options: FilesConfig, seed: int, batch_size: int):
        self.seed, self.usable = seed, usable_records(options, self.prompts)
        self.order = BatchOrder(self.usable.members, seed, batch_size, self.usable.weights, self.usable.records.blocks())
        self.fields, self.offered = self.usable.fields, self.usable.offered
        self.num_records = sum(map(len, self.usable.members.values()))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        number, size = self.order[index]
        try:
            record = self.usable.records[number]
            found = example(record, (size,), _fields(record, self.prompts), (self.seed, index))
        except FaultyRecord as fault:
            raise ConfigError(f"{fault}; repair it, or take it out") from fault
        source = self.usable.records.source(number)
        return found | {"source": source} if source else found

    @classmethod
    def epoch(cls, options: FilesConfig) -> Epoch:
        """Every record once."""
        return Epoch(Records(options.path, options, cls.prompts), options.sizes, excluded_texts(options.exclude))


class PromptsSource(FilesSource):
    """Prompts as a source: examples with a caption, its targets and the size to draw, and without an image."""

    Options: ClassVar[type] = PromptsConfig
    prompts = True


@dataclass(frozen=True)
class Epoch:
    """The examples of all records in the order of the files, with all captions, read when they are asked for.

    FaultyRecord for one that cannot be used, ConfigError for one with an excluded text.
    """

    records: Records
    sizes: Sequence[Size]
    excluded: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """Hash of the files' indexes, which tells when other records lie there."""
        return hashlib.sha256("".join(part.table.digest for part in self.records.parts).encode()).hexdigest()[:16]

    def __getitem__(self, number: int) -> Example:
        record = self.records[number]
        check_excluded(record, self.excluded)
        found = example(record, self.sizes, _fields(record, self.records.prompts), (number,))
        return found | ({"captions": record.texts} if record.texts else {})


@functools.lru_cache(maxsize=64)  # a run opens every part of a mixture more than once
def usable_records(options: FilesConfig, prompts: bool) -> Usable:
    """Looks at every record of a source, or reads it whole where faulty ones are to be skipped.

    Raises:
      ConfigError: there are none, some cannot be used and are not to be skipped, or one is among those to be excluded.
    """
    records = Records(options.path, options, prompts)
    faults, imageless, offered, common = [], 0, frozenset[str](), None
    members: dict[Size, tuple[array[int], array[float]]] = {}
    for number, found in enumerate(records.map(functools.partial(_look, records, options, excluded_texts(options.exclude)))):
        if isinstance(found, FaultyRecord):
            faults.append(found)
        elif found is None:
            imageless += 1
        else:
            shares, weight, fields = found
            for size, share in shares.items():
                numbers, weights = members.setdefault(size, (array("q"), array("d")))
                numbers.append(number)
                weights.append(weight * share)
            offered |= fields
            common = fields if common is None else common & fields
    if faults:
        told = f"{len(faults)} of {len(records)} records cannot be used; the first: {faults[0]}"
        if not options.skip_faulty or len(faults) == len(records):
            remedy = "" if options.skip_faulty else ", or leave them out with config.data.skip_faulty=True"
            raise ConfigError(f"{told}; repair them{remedy}")
        logging.getLogger(__name__).warning("%s", told)
    if common is None:
        what = "prompts" if prompts else "images"
        raise ConfigError(f"config.data.path={options.path}: holds no {what}; name files that hold some")
    if imageless:
        logging.getLogger(__name__).warning("%d of %d records are left out: they have no image", imageless, len(records))
    weights = {size: np.array(weight) for size, (_, weight) in members.items()}
    differ = len({value for weight in weights.values() for value in np.unique(weight)}) > 1
    return Usable(
        records, {size: np.array(numbers) for size, (numbers, _) in members.items()}, weights if differ else None, common, offered
    )


def _look(
    records: Records, options: FilesConfig, excluded: Mapping[str, str], number: int
) -> FaultyRecord | tuple[Mapping[Size, float], float, frozenset[str]] | None:
    """(share of each size, weight, fields) of a record; None where it has no image to learn, the fault where it cannot be used."""
    try:
        record = records[number]
        shapes = check_images(record, options.skip_faulty)
        if record.size is not None and record.size not in options.sizes:
            raise FaultyRecord(f"{record.where}: the size {record.size} is not among config.data.sizes={options.sizes}")
    except FaultyRecord as fault:
        return fault
    check_excluded(record, excluded)
    if not records.prompts and not shapes and not options.imageless:
        return None
    if record.size:
        shares = {record.size: 1.0}
    elif records.prompts:
        shares = options.shares
    else:
        shares = {nearest_size(shapes[_main(record)], options.sizes) if shapes else options.sizes[0]: 1.0}
    return shares, record.weight, _fields(record, records.prompts)


class Benchmark(str):
    """SUITE=FOLDER, an entry of `exclude`, with what it stands for: {prompt: its place}."""

    prompts: Mapping[str, str]


def check_images(record: Record, whole: bool) -> list[tuple[int, int]]:
    """(width, height) of the images of a record, of which all pixels are decoded if `whole`. FaultyRecord when one cannot be read."""

    def size(image: bytes | Path) -> tuple[int, int]:
        if is_video(image):
            return read_frame(image, float(whole)).size  # the last frame shows whether the video was cut off
        return read_image(image).size if whole else image_size(image)

    return [_read(record, image, size) for image in record.images]


def check_excluded(record: Record, excluded: Mapping[str, str]) -> None:
    """ConfigError when a text of a record is among `excluded_texts`."""
    for text in record.texts:
        if (place := excluded.get(_normalised(text))) is not None:
            raise ConfigError(f"{record.where}: the prompt {text!r} stands in {place}, which config.data.exclude names; take it out")


def excluded_texts(names: Sequence[str]) -> dict[str, str]:
    """{prompt, without regard to upper case and white space: its place} of the files and benchmarks. ConfigError for unreadable files."""
    found = dict[str, str]()
    for name in names:
        try:
            read = name.prompts if isinstance(name, Benchmark) else {t: r.where for r in Records(name, Columns(), True) for t in r.texts}
        except ValueError as fault:
            raise ConfigError(f"config.data.exclude: {str(fault).removeprefix('config.data.path=')}") from fault
        found |= {_normalised(text): place for text, place in read.items()}
    return found


def _normalised(text: str) -> str:
    """A prompt for comparison: without regard to upper case and white space."""
    return " ".join(text.casefold().split())


# ---- examples ----
def example(record: Record, sizes: Sequence[Size], fields: frozenset[str], seed: Sequence[int]) -> Example:
    """Some fields of a record's example. Images take the nearest of `sizes`.

    Of several captions one is drawn by `seed`, and so is the frame of a video; the question and the answer are those of the first
    turns. FaultyRecord for unreadable images.
    """
    said = {role: re.sub(r"\s*<image \d+( context)?>\s*", " ", text).strip() for role, text in reversed(record.turns)}
    found = {
        "id": record.key,
        "caption": _drawn(record.texts, seed) if record.texts else "",
        "question": said.get("user"),
        "answer": said.get("assistant"),
        "turns": record.turns,
        "system": record.system,
        "targets": {**record.targets, **({"metadata": record.metadata} if record.metadata else {})},
        "rewards": record.rewards,
        "size": record.size or sizes[0],
        "roles": record.roles,
    }
    if "images" in fields:
        found["images"] = [_image(record, n, sizes, seed) for n in range(len(record.images))]
    if "image" in fields:
        found["image"] = found["images"][_main(record)] if "images" in fields else _image(record, _main(record), sizes, seed)
    return {name: value for name, value in found.items() if name in fields}


def _drawn(texts: Sequence[str], seed: Sequence[int]) -> str:
    return texts[0] if len(texts) == 1 else str(np.random.default_rng(seed).choice(texts))  # a generator costs more than reading a row


def nearest_size(image: tuple[int, int], sizes: Sequence[Size]) -> Size:
    """The (height, width) whose shape is nearest to that of an image of (width, height)."""
    width, height = image
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(height / width)))


def _main(record: Record) -> int:
    """Number of the image that is learned: the one that is to come out, where roles say so."""
    return record.roles.index("output") if "output" in record.roles else 0


def _fields(record: Record, prompt: bool) -> frozenset[str]:
    """What the example of a record holds."""
    fields = {"id", *(f"targets.{name}" for name in record.targets), *(f"rewards.{name}" for name in record.rewards)}
    fields |= {"caption"} if record.texts else set()
    fields |= {"question", "answer", "turns", "system"} if record.turns else set()
    fields |= {"targets"} if record.targets or prompt else set()
    fields |= {"rewards"} if record.rewards else set()
    fields |= {"size"} if prompt else {"image"} if record.images else set()
    fields |= {"images", "roles"} if len(record.images) > 1 and not prompt else set()
    return frozenset(fields)


def _image(record: Record, number: int, sizes: Sequence[Size], seed: Sequence[int]) -> np.ndarray:
    def read(file: bytes | Path) -> Image.Image:
        return read_frame(file, np.random.default_rng(seed).random()) if is_video(file) else read_image(file)

    image = _read(record, record.images[number], read)
    height, width = nearest_size(image.size, sizes)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def _read(record: Record, image: bytes | Path, read: Callable[[bytes | Path], T]) -> T:
    try:
        return read(image)
    except UnreadableImage as error:
        called = "an image" if isinstance(image, bytes) else f"the image {image}"
        raise FaultyRecord(f"{record.where}: {called} cannot be read: {error}") from error
