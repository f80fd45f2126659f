"""Records of files as sources: images with their captions and conversations, and prompts whose images are to be drawn."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from xomni_jax.core.config import ConfigError
from xomni_jax.data.images import UnreadableImage, image_size, read_image
from xomni_jax.data.kinds import open_parts
from xomni_jax.data.records import Columns, Record, make_record
from xomni_jax.data.sources import ENDLESS, Example
from xomni_jax.data.tables import FaultyRecord

_READERS, _AT_ONCE = 16, 256  # threads, and the records that each of them takes at a time

Size = tuple[int, int]


@dataclass(frozen=True)
class FilesConfig(Columns):
    """Records in files. `xomni data kinds` lists the kinds of files, `xomni data check` reads them all.

    Attributes:
      path: a file, a folder, a glob, or several of these
      sizes: (height, width) in pixels of the images, multiples of the tokenizer's patch; a record takes the size that is nearest to the
        shape of its image, which is scaled to cover it, and loses what stands out; a prompt takes the first, or its own
      skip_faulty: leave out records that cannot be used, instead of refusing them; every image is then read once at the start
      exclude: files, such as those of a benchmark, whose prompts must not occur among the captions or prompts
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


class Records:
    """The records of files by number. A number is a position in the files, so that a faulty record does not move the others.

    Attributes:
      notes: what is no record and yet should be listed, a sentence each.
    """

    def __init__(self, paths: str | Sequence[str], how: Columns, prompts: bool):
        self.parts, self.how, self.prompts = open_parts(paths), how, prompts
        self.ends = list(itertools.accumulate(len(part.rows) for part in self.parts))
        self.notes = [note for part in self.parts for note in part.table.notes]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Record:
        """Raises FaultyRecord when the record cannot be used."""
        which = bisect_right(self.ends, number)
        part = self.parts[which]
        within = number - (self.ends[which] - len(part.rows))
        row = part.rows[within]
        record = make_record(
            part.table[row], f"{part.name}:{within}", part.table.where(row), part.table.root, self.how, prompt=self.prompts
        )
        return replace(record, weight=part.weight * record.weight, rewards=record.rewards or part.rewards)


class Found(NamedTuple):
    """What the first look at a record tells."""

    size: Size | None = None
    weight: float = 1.0
    fields: frozenset[str] = frozenset()
    fault: str = ""


class FilesSource:
    """Records with images as a source, drawn anew in every epoch.

    An epoch holds as many whole batches of every size as there are records for; at least one, for which records are repeated. Records of
    different weights are drawn with replacement, by weight.
    """

    Options: ClassVar[type] = FilesConfig
    prompts: ClassVar[bool] = False

    def __init__(self, options: FilesConfig, seed: int, batch_size: int):
        self.options, self.seed, self.batch_size = options, seed, batch_size
        self.records, self.members, self.fields = usable_records(options, self.prompts)
        total = sum(weight.sum() for _, weight in self.members.values())
        count = sum(len(numbers) for numbers, _ in self.members.values())
        # The size of every batch of an epoch, before they are shuffled, and the number of its earlier batches of that size.
        counts = {size: max(1, int(count * weight.sum() / total / batch_size + 1e-9)) for size, (_, weight) in self.members.items()}
        self.plan = [(size, n) for size, count in counts.items() for n in range(count)]
        self._order = functools.lru_cache(2 * len(counts) + 2)(self._permutation)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, self.batch_size)
        epoch, slot = divmod(batch, len(self.plan))
        size, earlier = self.plan[self._order(epoch, None)[slot]]
        record = self.records[int(self._order(epoch, size)[earlier * self.batch_size + row])]
        return _example(record, size, self.fields, np.random.default_rng([self.seed, index]))

    def _permutation(self, epoch: int, size: Size | None) -> np.ndarray:
        """Of the records of one size, or of the epoch's batches where the size is None."""
        rng = np.random.default_rng([self.seed, epoch, *(size or ())])
        if size is None:
            return rng.permutation(len(self.plan))
        numbers, weight = self.members[size]
        needed = self.batch_size * sum(planned == size for planned, _ in self.plan)
        if (weight != weight[0]).any():
            return rng.choice(numbers, needed, p=weight / weight.sum())
        return rng.permutation(np.resize(numbers, max(len(numbers), needed)))


class PromptsSource(FilesSource):
    """Prompts as a source: examples with a caption and its targets, and without an image."""

    prompts = True


@functools.lru_cache(maxsize=4)
def usable_records(options: FilesConfig, prompts: bool) -> tuple[Records, dict[Size, tuple[np.ndarray, np.ndarray]], frozenset[str]]:
    """The records of a source; numbers and weights of those of each size; the fields that all of them have.

    Raises:
      ConfigError: there are none, some cannot be used and are not to be skipped, or one is among those to be excluded.
    """
    records = Records(options.path, options, prompts)
    found = list(look(records, whole=options.skip_faulty, sizes=options.sizes, excluded=excluded_texts(options.exclude)))
    faults = [one.fault for one in found if one.fault]
    if faults:
        told = f"{len(faults)} of {len(found)} records cannot be used; the first: {faults[0]}"
        if not options.skip_faulty or len(faults) == len(found):
            remedy = "" if options.skip_faulty else ", or leave them out with config.data.skip_faulty=True"
            raise ConfigError(f"{told}; repair them{remedy}")
        logging.getLogger(__name__).warning("%s", told)
    if len(faults) == len(found):
        raise ConfigError(f"config.data.path={options.path}: holds no {'prompts' if prompts else 'images'}; name files that hold some")
    members: dict[Size, tuple[list[int], list[float]]] = {}
    for number, one in enumerate(found):
        if one.size is not None:
            numbers, weights = members.setdefault(one.size, ([], []))
            numbers.append(number)
            weights.append(one.weight)
    without = len(found) - len(faults) - sum(len(numbers) for numbers, _ in members.values())
    if without:
        logging.getLogger(__name__).warning("%d of %d records are left out: they have no image", without, len(found))
    fields = frozenset.intersection(*(one.fields for one in found if one.size is not None))
    return records, {size: (np.array(numbers), np.array(weights)) for size, (numbers, weights) in members.items()}, fields


def look(records: Records, *, whole: bool, sizes: Sequence[Size], excluded: Mapping[str, str]) -> Iterator[Found]:
    """What every record holds, in order of their numbers, read by several threads.

    Args:
      whole: decode the pixels of every image, instead of reading the header of its file.
      sizes: see `FilesConfig`.
      excluded: normalised prompts that must not occur, with their places.

    Raises:
      ConfigError: one of those occurs.
    """

    def chunk(start: int) -> list[Found]:
        return [_found(records, n, whole, sizes, excluded) for n in range(start, min(start + _AT_ONCE, len(records)))]

    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(chunk, range(0, len(records), _AT_ONCE)):
            yield from found


def _found(records: Records, number: int, whole: bool, sizes: Sequence[Size], excluded: Mapping[str, str]) -> Found:
    try:
        record = records[number]
        shapes = check_images(record, whole)
        if record.size is not None and record.size not in sizes:
            raise FaultyRecord(f"{record.where}: the size {record.size} is not among config.data.sizes={tuple(sizes)}")
    except FaultyRecord as fault:
        return Found(fault=str(fault))
    for text in record.texts:
        if (place := excluded.get(normalised(text))) is not None:
            raise ConfigError(f"{record.where}: the prompt {text!r} stands in {place}, which config.data.exclude names; take it out")
    if records.prompts:
        return Found(record.size or sizes[0], record.weight, frozenset({"id", "caption", "targets", "rewards"}))
    if not shapes:
        return Found()
    width, height = shapes[_main(record)]
    nearest = min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(height / width)))
    return Found(record.size or nearest, record.weight, _fields(record))


def check_images(record: Record, whole: bool) -> list[tuple[int, int]]:
    """(width, height) of the images of a record, of which all pixels are decoded if `whole`. FaultyRecord when one cannot be read."""
    shapes = []
    for image in record.images:
        try:
            shapes.append(read_image(image).size if whole else image_size(image))
        except UnreadableImage as error:
            raise FaultyRecord(f"{record.where}: {_called(image)} cannot be read: {error}") from error
    return shapes


def normalised(text: str) -> str:
    """A prompt for comparison: without regard to upper case and white space."""
    return " ".join(text.casefold().split())


def excluded_texts(paths: Sequence[str]) -> dict[str, str]:
    """{normalised prompt: its place} of files of prompts. ConfigError when one of them cannot be read, or a record of it."""
    if not paths:
        return {}
    try:
        return {normalised(text): record.where for record in Records(paths, Columns(), True) for text in record.texts}
    except FaultyRecord as fault:
        raise ConfigError(f"config.data.exclude: {fault}") from fault


# ---- examples ----
def _main(record: Record) -> int:
    """Number of the image that is learned: the one that is to come out, where roles say so."""
    return record.roles.index("output") if "output" in record.roles else 0


def _fields(record: Record) -> frozenset[str]:
    """What the example of a record holds."""
    fields = {"id", "image"}
    fields |= {"caption"} if record.texts else set()
    fields |= {"question", "answer", "turns", "system"} if record.turns else set()
    fields |= {"targets"} if record.targets else set()
    fields |= {"images", "roles"} if len(record.images) > 1 else set()
    return frozenset(fields)


def _example(record: Record, size: Size, fields: frozenset[str], rng: np.random.Generator) -> Example:
    """The example of a record. Of several captions one is drawn; the question and the answer are those of the first turns."""
    said = {role: re.sub(r"\s*<image \d+>\s*", " ", text).strip() for role, text in reversed(record.turns)}
    example = {
        "id": record.key,
        "caption": str(rng.choice(record.texts)) if record.texts else "",
        "question": said.get("user"),
        "answer": said.get("assistant"),
        "turns": record.turns,
        "system": record.system,
        "targets": {**record.targets, **({"metadata": record.metadata} if record.metadata else {})},
        "rewards": record.rewards,
        "roles": record.roles,
    }
    if "images" in fields:
        example["images"] = [_image(record, n, size) for n in range(len(record.images))]
    if "image" in fields:
        example["image"] = example["images"][_main(record)] if "images" in fields else _image(record, _main(record), size)
    return {name: value for name, value in example.items() if name in fields}


def _image(record: Record, number: int, size: Size) -> np.ndarray:
    image = record.images[number]
    try:
        read = read_image(image)
    except UnreadableImage as error:
        raise ConfigError(f"{record.where}: {_called(image)} cannot be read: {error}; repair it, or take it out") from error
    return np.asarray(ImageOps.fit(read, size[::-1], Image.Resampling.BICUBIC))


def _called(image: bytes | Path) -> str:
    return "an image" if isinstance(image, bytes) else f"the image {image}"
