"""Kinds of files that records come from: how each is told from the others, and what opens it as a table."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from xomni_jax.core.config import ConfigError
from xomni_jax.data.tables import Table, path_of, readable
from xomni_jax.data.text_tables import TEXT_SUFFIXES

_LFS_POINTER = b"version https://git-lfs"
_IGNORED = ("_tmp", "__MACOSX")  # folders that downloads leave behind
_ON_DISK = ("array_record", "tfds", "list")  # kinds that are not read from a bucket: the library of the first two knows files alone


class Kind(NamedTuple):
    """A kind of files.

    Attributes:
      files: what a user calls it.
      example: a value of config.data.path.
      opens: "module:function" of (files, root) -> Table, the files being the shards of one table, in order of their names.
      fits: whether a file is of this kind, by its path and its first 512 bytes.
    """

    files: str
    example: str
    opens: str
    fits: Callable[[Path, bytes], bool]


def _ending(*endings: str) -> Callable[[Path, bytes], bool]:
    return lambda path, head: path.name.lower().endswith(endings)


# The first kind that fits reads a file. A folder is of the first kind that fits one of its files.
KINDS: dict[str, Kind] = {
    "instruct-pix2pix": Kind(
        "seeds.json with NAME/prompt.json, NAME/SEED_0.jpg and NAME/SEED_1.jpg beside it", "pairs/seeds.json",
        "xomni_jax.data.image_folders:open_seeds", lambda path, head: path.name == "seeds.json",
    ),
    "list": Kind(
        "a YAML list of files with weights or strategies, as DeepGen-RL and LLaVA-OneVision have it", "mix.yaml",
        "xomni_jax.data.listed:open_listed", _ending(".yaml", ".yml"),
    ),
    "tfds": Kind(
        "a folder that TensorFlow Datasets wrote with file_format=array_record", "coco_captions/2014/1.1.0",
        "xomni_jax.data.tfds_table:open_tfds", lambda path, head: path.name == "dataset_info.json",
    ),
    "array_record": Kind(
        "ArrayRecord files of msgpack maps or tf.Example", "shards/*.array_record",
        "xomni_jax.data.array_record_table:ArrayRecordTable", lambda path, head: ".array_record" in path.name,
    ),
    "webdataset": Kind(
        "webdataset tars, also as img2dataset writes them", "shards/*.tar", "xomni_jax.data.tar_table:TarTable",
        lambda path, head: path.name.endswith((".tar", ".tar.gz", ".tgz")) or head[257:262] == b"ustar",
    ),
    "parquet": Kind(
        "parquet files, as Hugging Face's datasets writes them", "data/train-*.parquet",
        "xomni_jax.data.parquet_table:ParquetTable", lambda path, head: path.suffix == ".parquet" or head.startswith(b"PAR1"),
    ),
    "images": Kind(
        "a folder of images with metadata.jsonl or metadata.csv (Hugging Face's imagefolder), or NAME.txt or NAME.json beside NAME.png",
        "my_images", "xomni_jax.data.image_folders:open_folder", lambda path, head: False,
    ),
    "text": Kind(
        "JSON lines, a list in JSON, csv, tsv, or plain text, a prompt or a text in every line", "train.jsonl",
        "xomni_jax.data.text_tables:open_text", _ending(*TEXT_SUFFIXES),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Rows of one table that are a part of a source.

    Attributes:
      name: of the part, in the keys of its records.
      rows: numbers of the table's rows, in the order of the source.
      source: its name in the list that holds it, for metrics; empty elsewhere.
      weight: how often each of its records is drawn, relative to those of the other parts.
      rewards: weights of the rewards that judge its prompts; empty: those of the configuration.
    """

    table: Table
    name: str
    rows: Sequence[int]
    source: str = ""
    weight: float = 1.0
    rewards: Mapping[str, float] = field(default_factory=dict)


def open_parts(paths: str | Sequence[str], split: str = "") -> list[Part]:
    """The parts of a source: of every file, folder or glob among the paths, in the given order; those of a glob in order of their names.

    Args:
      split: see `records.Columns`.

    Raises:
      ConfigError: a path or a glob leads to nothing, a file is of no known kind, or it cannot be opened.
    """
    return [part for path in ([paths] if isinstance(paths, str) else paths) for part in _parts(path, split)]


def _parts(path: str, split: str) -> list[Part]:
    found = _found(path)
    if not found:
        raise ConfigError(
            f"config.data.path={path}: {'no file fits this' if glob.has_magic(path) else 'no such file or folder'}; correct it"
        )
    parts: list[Part] = []
    for (kind, folder, _), shards in itertools.groupby(found, _table_of):
        files = list(shards)
        if "://" in path and kind in _ON_DISK:
            raise ConfigError(f"config.data.path={path}: files of this kind are read from this machine; copy them, or mount the bucket")
        if split and kind != "tfds":
            raise ConfigError(f"config.data.split={split}: {path} is no data set of TensorFlow Datasets; name the files of the split")
        if kind == "list":
            parts += opener(kind)(files[0])
        else:
            within = _files_within(folder, kind) if folder == files[0] else files
            table = opener(kind)(within, folder, split) if split else opener(kind)(within, folder)
            parts.append(Part(table, files[0].stem, range(len(table))))
    return parts


def _found(path: str) -> list[Path]:
    """The file or folder, or what a glob fits; in a bucket, such as gs://name, a glob of names in one folder."""
    if "://" in path:
        there = path_of(path)
        try:
            return [there] if there.exists() else sorted(there.parent.glob(there.name), key=os.fsencode)
        except ImportError as error:
            raise ConfigError(f"config.data.path={path}: reading from a bucket needs a package: pip install 'xomni_jax[gcs]'") from error
    return [Path(path)] if os.path.exists(path) else sorted(map(Path, glob.glob(path, recursive=True)), key=os.fsencode)


def _table_of(path: Path) -> tuple[str, Path, Path | None]:
    """What files of one table have in common: kind, root of the paths in it, and the file itself where it is a table of its own."""
    kind = kind_of(path)
    return kind, path if path.is_dir() else path.parent, path if kind in ("text", "list") or path.is_dir() else None


def opener(kind: str) -> Callable[..., Any]:
    """The function that opens files of a kind; its module, and the libraries that it needs, are imported now."""
    module, _, name = KINDS[kind].opens.partition(":")
    return getattr(import_module(module), name)


def kind_of(path: Path) -> str:
    """The kind of a file or folder. ConfigError when there is none."""
    if path.is_dir():
        names = files_below(path)
        inside = (kind for kind in KINDS if kind not in ("list", "text") and any(KINDS[kind].fits(name, b"") for name in names))
        return next(inside, "images")
    with readable(path), path.open("rb") as file:
        head = file.read(512)
    if head.startswith(_LFS_POINTER):
        raise ConfigError(f"{path} is a pointer of git-lfs in place of the file; fetch the file with: git lfs pull")
    kind = next((name for name, kind in KINDS.items() if kind.fits(path, head)), None)
    if kind is None:
        raise ConfigError(f"config.data.path={path}: files of this kind are not read; xomni data kinds lists those that are")
    return kind


def files_below(folder: Path) -> list[Path]:
    """The files at any depth, in order of the bytes of their names, without hidden ones and what downloads leave behind."""
    out: list[Path] = []
    with readable(folder):
        for path in sorted(folder.iterdir(), key=os.fsencode):
            if not path.name.startswith(".") and path.name not in _IGNORED:
                out += files_below(path) if path.is_dir() else [path]
    return out


def _files_within(folder: Path, kind: str) -> list[Path]:
    return files_below(folder) if kind == "images" else [file for file in files_below(folder) if KINDS[kind].fits(file, b"")]
