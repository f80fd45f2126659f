"""ArrayRecord files as rows by number, of records that no file describes."""

import pytest

from tests.data.containers import ROWS, example, write_array_record
from xomni_jax.core.config import ConfigError
from xomni_jax.data.array_record_table import ArrayRecordTable
from xomni_jax.data.tables import FaultyRecord


def test_msgpack_maps_are_numbered_through_shards(tmp_path):
    shards = [ROWS[:2], [], ROWS[2:]]
    files = [write_array_record(tmp_path / f"x-{n}.array_record", rows) for n, rows in enumerate(shards)]
    table = ArrayRecordTable(files, tmp_path)
    assert list(table) == ROWS
    assert [table[n] for n in (6, 1, 2)] == [ROWS[n] for n in (6, 1, 2)]
    assert table.where(2) == f"{files[2]} record 0"
    assert table.notes == [f"{files[1]}: a shard of no records"]


def test_features_of_an_example(tmp_path):
    png = b"\x89PNG\r\n\x1a\n\0"
    record = example(image__encoded=[png], caption=["Grün".encode()], texts=[b"one", b"two"], height=[28], box=[0.5, 1.0])
    table = ArrayRecordTable([write_array_record(tmp_path / "x", [record])], tmp_path)
    assert table[0] == {"image/encoded": png, "caption": "Grün", "texts": ["one", "two"], "height": 28, "box": [0.5, 1.0]}


@pytest.mark.parametrize(("faulty", "reason"), [(b"\xc1 no", "not msgpack"), ([1, 2], "not msgpack, or no map"), (b"", "not msgpack")])
def test_a_record_of_another_codec_is_a_fault_and_not_the_first_one_tells_the_codec(tmp_path, faulty, reason):
    file = write_array_record(tmp_path / "x", [faulty, *ROWS])
    table = ArrayRecordTable([file], tmp_path)
    with pytest.raises(FaultyRecord, match=f"^{file} record 0: {reason}"):
        table[0]
    assert table[7] == ROWS[6]


def test_the_codec_may_be_named(tmp_path):
    table = ArrayRecordTable([write_array_record(tmp_path / "x", ROWS)], tmp_path, "example")
    with pytest.raises(FaultyRecord, match="not a tf.Example"):
        table[0]


def test_records_of_no_codec_are_refused(tmp_path):
    file = write_array_record(tmp_path / "x", [b"\xff\xfe plain", b""])
    with pytest.raises(ConfigError, match=f"^{file}: its first records are neither msgpack maps nor tf.Example"):
        ArrayRecordTable([file], tmp_path)


@pytest.mark.parametrize("size", [2, 64])
def test_large_groups_are_read_and_noted(tmp_path, size):
    file = write_array_record(tmp_path / "x", ROWS, f"group_size:{size}")
    table = ArrayRecordTable([file, write_array_record(tmp_path / "y", ROWS)], tmp_path)
    assert list(table) == ROWS * 2
    assert table.notes == [
        f"{file}: written in groups of {size} records, which are decompressed together to read one of them; write them with group_size:1"
    ]


@pytest.mark.parametrize("kept", [1, 70_000, 131_000])
def test_a_file_that_is_cut_off_is_no_empty_one(tmp_path, kept):
    file = write_array_record(tmp_path / "x", ROWS)
    file.write_bytes(file.read_bytes()[:kept])
    table = ArrayRecordTable([file], tmp_path)
    with pytest.raises(FaultyRecord, match=f"^{file} is no whole array_record file, but damaged or cut off"):
        table[0]
