"""What tables of several files have in common, for every format."""

import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.containers import same, sample, write_array_record, write_parquet, write_tar
from tests.data.test_files import beside_json, beside_txt, metadata_csv, metadata_jsonl, write_images
from tests.miniature import ROOT
from xomni_jax.core.config import ConfigError
from xomni_jax.data.array_record_table import ArrayRecordTable
from xomni_jax.data.files import FilesConfig, FilesSource, Records
from xomni_jax.data.image_folders import METADATA
from xomni_jax.data.kinds import open_parts
from xomni_jax.data.parquet_table import ParquetTable
from xomni_jax.data.records import Columns
from xomni_jax.data.shards import Recent
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.data.tar_table import TarTable

COUNT = 40


def _parquet(file, numbers):
    return write_parquet(file, [{"key": f"k{n}", "image": os.urandom(200), "caption": f"sign {n}"} for n in numbers], group=3)


def _tar(file, numbers):
    return write_tar(file, [member for n in numbers for member in sample(f"k{n}", image=os.urandom(200), text=f"sign {n}")])


def _array_record(file, numbers):
    return write_array_record(file, [{"key": f"k{n}", "image": os.urandom(200), "caption": f"sign {n}"} for n in numbers])


FORMATS = {"parquet": (ParquetTable, _parquet), "tar": (TarTable, _tar), "array_record": (ArrayRecordTable, _array_record)}


@pytest.fixture(scope="module", params=FORMATS)
def table(request, tmp_path_factory):
    folder, (kind, write) = tmp_path_factory.mktemp(request.param), FORMATS[request.param]
    parts = np.array_split(np.arange(COUNT), 3)
    return kind([write(folder / f"{n}.{request.param}", part.tolist()) for n, part in enumerate(parts)], folder)


def test_random_access_equals_reading_in_order(table):
    rows = list(table)
    assert [row["key"] for row in rows] == [f"k{n}" for n in range(COUNT)]
    for n in np.random.default_rng(0).integers(0, COUNT, 200).tolist():
        assert same(table[n], rows[n])


def test_threads_may_share_a_table(table):
    rows, order = list(table), np.random.default_rng(1).integers(0, COUNT, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(table.__getitem__, order)) == [rows[n] for n in order]


def test_a_table_may_be_pickled_after_use(table):
    rows = list(table)
    copy = pickle.loads(pickle.dumps(table))
    assert (list(copy), copy.digest, copy.where(COUNT - 1)) == (rows, table.digest, table.where(COUNT - 1))


def _send_rows(table, numbers, queue):
    queue.put([table[n] for n in numbers])


def test_forked_workers_share_no_position_in_a_file(table):
    rows, context = list(table), multiprocessing.get_context("fork")
    queue, orders = context.Queue(), [list(range(COUNT)), list(range(COUNT))[::-1]]
    workers = [context.Process(target=_send_rows, args=(table, order, queue)) for order in orders]
    for worker in workers:
        worker.start()
    for n in range(COUNT):
        assert table[n] == rows[n]
    for got in (queue.get(timeout=60), queue.get(timeout=60)):
        assert got in (rows, rows[::-1])
    for worker in workers:
        worker.join(60)


def test_another_process_finds_the_same_digest(table):
    code = (
        f"import sys; from pathlib import Path; from {type(table).__module__} import {type(table).__name__} as T; "
        "files = [Path(f) for f in sys.argv[1:]]; print(T(files, files[0].parent).digest)"
    )
    told = subprocess.run([sys.executable, "-c", code, *map(str, table.files)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert told.stdout.strip() == table.digest


def test_the_digest_is_that_of_the_rows_and_not_of_the_place(table, tmp_path):
    copies = [tmp_path / file.name for file in table.files]
    for file, copy in zip(table.files, copies, strict=True):
        copy.write_bytes(file.read_bytes())
    kind, write = type(table), FORMATS[table.files[0].suffix[1:]][1]
    assert kind(copies, tmp_path).digest == table.digest
    assert kind(copies[::-1], tmp_path).digest != table.digest
    write(copies[1], range(5))
    assert kind(copies, tmp_path).digest != table.digest


FAULTS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of git-lfs in place of the file"),
    "gzip": (gzip.compress(b"x" * 2000), "is compressed with gzip, which allows no random access; unpack it"),
    "page": (b"<!DOCTYPE html><html>" + b" " * 2000, "is a web page or XML; download the file again"),
    "other": (b"no such format " * 100, "is no whole {} file, but damaged or cut off"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read_is_one_faulty_row(tmp_path, kind, fault):
    opens, write = FORMATS[kind]
    bad, (content, reason) = tmp_path / f"bad.{kind}", FAULTS[fault]
    bad.write_bytes(content)
    table = opens([write(tmp_path / f"a.{kind}", range(3)), bad, write(tmp_path / f"c.{kind}", range(3, 5))], tmp_path)
    assert len(table) == 6
    with pytest.raises(FaultyRecord) as told:
        table[3]
    assert str(told.value).startswith(f"{bad} {reason.format(kind)}")
    assert table.where(3) == str(bad)
    assert [table[n]["key"] for n in (0, 2, 4, 5)] == ["k0", "k2", "k3", "k4"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_not_there_is_one_faulty_row(tmp_path, kind):
    opens, write = FORMATS[kind]
    gone = tmp_path / f"gone.{kind}"
    table = opens([gone, write(tmp_path / f"a.{kind}", range(2))], tmp_path)
    with pytest.raises(FaultyRecord, match=f"^{gone} cannot be read: No such file or directory$"):
        table[0]
    assert table[1]["key"] == "k0"


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_an_empty_or_cut_file_is_one_faulty_row(tmp_path, kind):
    opens, write = FORMATS[kind]
    cut, empty = write(tmp_path / f"cut.{kind}", range(30)), tmp_path / f"empty.{kind}"
    cut.write_bytes(cut.read_bytes()[:-60])
    empty.write_bytes(b"")
    table = opens([cut, empty], tmp_path)
    with pytest.raises(FaultyRecord, match=f"^{cut} is no whole {kind} file, but damaged or cut off"):
        table[0]
    with pytest.raises(FaultyRecord, match=f"^{empty} has no bytes: it was not written to its end"):
        table[1]


class _Bucket(MemoryFileSystem):
    protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Paths gs://... are files in memory, in place of gcsfs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: _Bucket())


@pytest.mark.parametrize("write", [beside_txt, beside_json, metadata_jsonl, metadata_csv])
def test_a_folder_of_images_in_a_bucket(tmp_path, write, bucket):
    here, there = tmp_path / "here", epath.Path(f"gs://drawings/{write.__name__}")
    write_images(here)
    write(here)
    there.mkdir(parents=True)
    for file in here.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    local = FilesSource(FilesConfig(path=str(here), sizes=((32, 64),)), 0, 2)
    for path in (there, *(there / name for name in METADATA if (there / name).exists())):
        source = FilesSource(FilesConfig(path=str(path), sizes=((32, 64),)), 0, 2)
        for n in range(4):
            assert source[n]["caption"] == local[n]["caption"]
            np.testing.assert_array_equal(source[n]["image"], local[n]["image"])


@pytest.mark.parametrize("image", ["../secret.png", "/secret.png", "a/../../secret.png", "gs://other/secret.png"])
def test_a_row_in_a_bucket_names_no_file_outside_its_folder(image, bucket):
    file = epath.Path("gs://drawings/escape/train.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"image": image, "text": "a sign"}))
    with pytest.raises(FaultyRecord, match="lies outside gs://drawings/escape|is a web address"):
        Records(str(file), Columns(), False)[0]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_files_of_a_bucket_are_read_in_place(tmp_path, kind, bucket):
    opens, write = FORMATS[kind]
    here = [write(tmp_path / f"{n}.{kind}", range(4 * n, 4 * n + 4)) for n in range(2)]
    there = [epath.Path(f"gs://signs/{kind}") / file.name for file in here]
    there[0].parent.mkdir(parents=True)
    for file, copy in zip(here, there, strict=True):
        copy.write_bytes(file.read_bytes())
    table, local = opens(there, there[0].parent), opens(here, tmp_path)
    assert list(table) == list(local)
    assert table.where(5).startswith(f"gs://signs/{kind}/1.{kind} ")
    assert table.digest == local.digest == opens(there, there[0].parent).digest
    assert not (tmp_path / "home").exists()  # indices lie in the bucket
    for path in (f"gs://signs/{kind}", f"gs://signs/{kind}/*.{kind}"):
        (part,) = open_parts(path)
        assert (part.table.files, list(part.table), part.table.digest) == (there, list(local), local.digest)
    (there[0].parent / "more.array_record").write_bytes(b"")
    with pytest.raises(ConfigError, match="more.array_record: files of this kind are read from this machine; copy them"):
        open_parts(f"gs://signs/{kind}/more.array_record")
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_parts("gs://signs/none")


def test_recent_values_are_few_and_made_once():
    made = []
    recent = Recent(lambda *key: made.append(key) or key, 2)
    for key in (1, 2, 1, 3, 1, 2):
        assert recent(key, "x") == (key, "x")
    assert [key for key, _ in made] == [1, 2, 3, 2]


def test_the_cost_of_recent_values_is_limited():
    made = []
    recent = Recent(lambda n: made.append(n) or n, 10, int)
    for n in (4, 6, 4, 6, 20, 20, 4, 5, 4, 5):
        recent(n)
    assert made == [4, 6, 20, 4, 5]


def test_a_bucket_without_its_package_is_refused(monkeypatch):
    def missing(name):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", missing)
    with pytest.raises(ConfigError, match=r"gs://signs/x.tar: reading from a bucket needs a package: pip install 'xomni_jax\[gcs\]'"):
        open_parts("gs://signs/x.tar")
