"""Images and captions of your own: a folder, or a file of JSON lines, as sources."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from xomni_jax.core.config import ConfigError
from xomni_jax.data.images import UnreadableImage, image_size, read_image
from xomni_jax.data.records import FaultyRecord, Record, folder_records, table_records
from xomni_jax.data.sources import ENDLESS, Example

_READERS = 16  # threads


@dataclass(frozen=True)
class FilesConfig:
    """Images in files, with their captions.

    Attributes:
      path: folder - images with captions in files of the same name (.txt, or .json with columns), or with metadata.jsonl or .csv as
        Hugging Face's imagefolder has them; jsonl - a file of JSON lines, a JSON list or a csv
      sizes: (height, width) in pixels of the images that are learned, multiples of the tokenizer's patch; an image takes the size that
        is nearest to its shape, is scaled to cover it, and loses what stands out
      image, caption: columns of the image's path and of the caption, a.b inside nested ones; empty - the first usual name
      images: folder that holds the images, to which paths are relative unless they are absolute; empty - the one that holds the file
      skip_faulty: leave out records that cannot be used, instead of refusing them; every image is then read once at the start
    """

    path: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    image: str = ""
    caption: str = ""
    images: str = ""
    skip_faulty: bool = False

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name the folder of images, or the file of records")
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes={self.sizes} must hold one or more (height, width) in pixels, such as ((1152, 1152),)")


class FolderSource:
    """A folder of images as a source, shuffled anew in every epoch.

    An epoch holds as many whole batches of every size as there are images for; at least one, for which images are repeated.
    """

    Options: ClassVar[type] = FilesConfig
    kind: ClassVar[str] = "folder"

    def __init__(self, options: FilesConfig, seed: int, batch_size: int):
        self.options, self.seed, self.batch_size = options, seed, batch_size
        self.records, self.members = usable_records(self.kind, options)
        # The size of every batch of an epoch, before they are shuffled, and the number of its earlier batches of that size.
        counts = {size: max(1, len(members) // batch_size) for size, members in self.members.items()}
        self.plan = [(size, n) for size, count in counts.items() for n in range(count)]
        self._order = functools.lru_cache(2 * len(counts) + 2)(self._permutation)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, self.batch_size)
        epoch, slot = divmod(batch, len(self.plan))
        size, earlier = self.plan[self._order(epoch, None)[slot]]
        record = self.records[self._order(epoch, size)[earlier * self.batch_size + row]]
        try:
            image = read_image(record.image)
        except UnreadableImage as error:
            raise ConfigError(f"{record.where}: the image {record.image} cannot be read: {error}; repair it, or take it out") from error
        height, width = size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return {"id": record.id, "image": np.asarray(image), "caption": record.caption, **record.more}

    def _permutation(self, epoch: int, size: tuple[int, int] | None) -> np.ndarray:
        """Of the records of one size, or of the epoch's batches where the size is None."""
        what = np.arange(len(self.plan)) if size is None else np.resize(self.members[size], max(len(self.members[size]), self.batch_size))
        return np.random.default_rng([self.seed, epoch, *(size or ())]).permutation(what)


class JsonLinesSource(FolderSource):
    """A file of records that name their images, as a source."""

    kind = "jsonl"


@functools.lru_cache(maxsize=4)
def usable_records(kind: str, options: FilesConfig) -> tuple[list[Record], dict[tuple[int, int], list[int]]]:
    """The records of a source, and the numbers of those of each size. Columns that not every record has are left out.

    Raises:
      ConfigError: there are none, or some cannot be used and are not to be skipped.
    """
    read = folder_records if kind == "folder" else table_records
    found = list(read(Path(options.path), options.image, options.caption, options.images))
    with ThreadPoolExecutor(_READERS) as pool:
        checked = list(pool.map(functools.partial(_checked, whole=options.skip_faulty), found))
    faults = [record for record, _ in checked if isinstance(record, FaultyRecord)]
    records = [(record, size) for record, size in checked if isinstance(record, Record)]
    if faults:
        told = f"{len(faults)} of {len(found)} records cannot be used; the first: {faults[0]}"
        if not options.skip_faulty or not records:
            raise ConfigError(
                f"{told}; repair them" + ("" if options.skip_faulty else ", or leave them out with config.data.skip_faulty=True")
            )
        logging.getLogger(__name__).warning("%s", told)
    if not records:
        raise ConfigError(f"config.data.path={options.path}: holds no images; name a folder with images in it, or a file of records")
    common = set.intersection(*(set(record.more) for record, _ in records))
    members: dict[tuple[int, int], list[int]] = {}
    for n, (_, (width, height)) in enumerate(records):
        nearest = min(options.sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(height / width)))
        members.setdefault(nearest, []).append(n)
    return [replace(record, more={name: record.more[name] for name in common}) for record, _ in records], members


def _checked(record: Record | FaultyRecord, whole: bool) -> tuple[Record | FaultyRecord, tuple[int, int]]:
    """The record with the (width, height) of its image, or the reason why it cannot be used. `whole`: read all of the image."""
    if isinstance(record, FaultyRecord):
        return record, (0, 0)
    try:
        return record, read_image(record.image).size if whole else image_size(record.image)
    except UnreadableImage as error:
        return FaultyRecord(f"{record.where}: the image {record.image} cannot be read: {error}"), (0, 0)
