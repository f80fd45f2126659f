"""A folder that TensorFlow Datasets wrote, as a table. Needs the package tensorflow-datasets, but not TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.core.config import ConfigError
from xomni_jax.data.array_record_table import ArrayRecordTable, as_text
from xomni_jax.data.shards import first_line
from xomni_jax.data.tables import FaultyRecord


def open_tfds(files: Sequence[Path], root: Path, split: str = "") -> ArrayRecordTable:
    """The table of a split of the data set in the folder `root`; without a name train, or the only one. The data set names its own files.

    Raises:
      ConfigError: the data set cannot be read, lacks the split, or was not written as array_record.
    """
    from tensorflow_datasets import builder_from_directory

    try:
        info = builder_from_directory(root).info
    except Exception as error:  # noqa: BLE001 - faults of two JSON files show as anything
        raise ConfigError(f"{root} is no data set of TensorFlow Datasets: {first_line(error)}") from error
    kind = info.file_format.file_suffix
    if kind != "array_record":
        raise ConfigError(
            f"{root} was written as {kind}, which allows no random access; convert it with: tfds convert_format "
            f"--dataset_version_dir={root} --out_file_format=array_record --out_dir=NEW_FOLDER"
        )
    split = split or (next(iter(info.splits)) if len(info.splits) == 1 else "train")
    if split not in info.splits:
        names = ", ".join(sorted(info.splits)) or "none"
        raise ConfigError(f"{root} has no split {split}; config.data.split names one of those that it has: {names}")
    told = info.splits[split]
    table = ArrayRecordTable([Path(file) for file in told.filepaths], root, functools.partial(_decode, root))
    if len(table) != told.num_examples:
        raise ConfigError(f"{root}: dataset_info.json tells of {told.num_examples} examples, the files hold {len(table)}; get it again")
    return table


def _decode(root: Path, record: bytes) -> dict[str, Any]:
    """A record -> its features, nested ones as a/b: images as they were encoded, text as text, arrays as NumPy's, the rest as Python's."""
    try:
        return dict(_flat("", _features(root).deserialize_example_np(record)))
    except Exception as error:  # noqa: BLE001 - a record that does not fit may raise anything
        raise FaultyRecord(f"it does not fit features.json ({first_line(error)})") from error


@functools.cache
def _features(root: Path) -> Any:
    """The features of the data set, its images as bytes."""
    from tensorflow_datasets import builder_from_directory

    return _undecoded(builder_from_directory(root).info.features)


def _undecoded(feature: Any) -> Any:
    """A feature with the images in it as the bytes that are stored; tfds can leave those in a sequence encoded in no other way."""
    from tensorflow_datasets import features

    if isinstance(feature, features.Image):
        return features.Tensor(shape=(), dtype=np.object_)
    if isinstance(feature, features.FeaturesDict):
        return features.FeaturesDict({name: _undecoded(inner) for name, inner in feature.items()})
    return features.Sequence(_undecoded(feature.feature)) if type(feature) is features.Sequence else feature


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for inner, of in value.items():
            yield from _flat(f"{name}/{inner}" if name else inner, of)
    else:
        yield name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else as_text(value)
