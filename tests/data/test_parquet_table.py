"""Parquet files as rows by number."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.containers import ROWS, png, write_parquet
from xomni_jax.core.config import ConfigError
from xomni_jax.data import parquet_table
from xomni_jax.data.files import FilesConfig, FilesSource
from xomni_jax.data.parquet_table import ParquetTable
from xomni_jax.data.tables import FaultyRecord


def test_rows_are_numbered_through_shards_and_row_groups(tmp_path):
    files = [write_parquet(tmp_path / "a.parquet", ROWS[:5]), write_parquet(tmp_path / "b.parquet", ROWS[5:], group=1)]
    table = ParquetTable(files, tmp_path)
    assert list(table) == ROWS
    assert [table[n] for n in (6, 0, 4, 3)] == [ROWS[n] for n in (6, 0, 4, 3)]
    assert table.where(4) == f"{files[0]} row 4"
    assert table.where(6) == f"{files[1]} row 1"
    assert table.notes == []
    assert table.blocks.tolist() == [0, 0, 1, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        table[7]


def test_values_of_every_type_of_an_image_column(tmp_path):
    image = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    columns = {"image": image, "pages": pa.list_(image), "raw": pa.large_binary(), "name": pa.string(), "none": pa.null()}
    rows = [
        {"image": {"bytes": b"1", "path": None}, "pages": [{"bytes": b"2", "path": "x.png"}], "raw": b"3", "name": "y.png", "none": None},
        {"image": {"bytes": None, "path": "z.png"}, "pages": [], "raw": None, "name": None, "none": None},
        {"image": None, "pages": None, "raw": b"", "name": "", "none": None},
    ]
    table = ParquetTable([write_parquet(tmp_path / "x.parquet", rows, 2, pa.schema(columns))], tmp_path)
    assert list(table) == rows


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of the row groups that are decoded from now on."""
    made, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group, columns: made.append(group) or read(file, group, columns))
    return made


def test_a_row_group_is_decoded_once_and_few_are_kept(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(parquet_table, "_BYTES", 500)  # about four groups
    table = ParquetTable([write_parquet(tmp_path / "x.parquet", ROWS * 4, group=4)], tmp_path)
    list(table)
    assert decoded == list(range(7))
    for n in (27, 26, 12, 13):  # in the groups that were decoded last
        assert table[n] == ROWS[n % 7]
    assert decoded == list(range(7))
    assert table[0] == ROWS[0]
    assert decoded == [*range(7), 0]


def test_only_the_columns_asked_for_are_decoded(tmp_path):
    file = write_parquet(tmp_path / "x.parquet")
    assert ParquetTable([file], tmp_path, ["caption"])[3] == {"caption": "sign 3"}
    with pytest.raises(ConfigError, match="there is no column words; there are caption, image, key"):
        ParquetTable([file], tmp_path, ["words"])


def test_shards_may_differ_in_columns_and_be_empty(tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("image", pa.binary())])
    none = write_parquet(tmp_path / "a.parquet", [], schema=schema)
    more = write_parquet(tmp_path / "b.parquet", [{"key": "x", "score": 1.5}])
    table = ParquetTable([none, more, write_parquet(tmp_path / "c.parquet")], tmp_path, ["key", "score"])
    assert [table[0], table[1]] == [{"key": "x", "score": 1.5}, {"key": "k0"}]
    assert table.notes == [
        f"{none}: a shard of no rows",
        f"{none}: has no column score, which other shards have",
        f"{tmp_path / 'c.parquet'}: has no column score, which other shards have",
    ]


def test_a_damaged_row_group_is_a_fault_of_its_rows_alone(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=2, compression="zstd")
    place = pq.ParquetFile(file).metadata.row_group(1).column(2).data_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 16] = b"\xff" * 16
    file.write_bytes(data)
    table = ParquetTable([file], tmp_path)
    for n in (2, 3):
        with pytest.raises(FaultyRecord, match=f"^{file} row {n}: it cannot be read"):
            table[n]
    assert [table[n] for n in (0, 1, 4, 5, 6)] == [ROWS[n] for n in (0, 1, 4, 5, 6)]


def test_a_source_draws_at_random_and_decodes_a_row_group_a_few_times(tmp_path, monkeypatch, decoded):
    rows = [{"image": png(size=(4, 4 + 4 * (n % 2))), "caption": str(n)} for n in range(240)]
    file = write_parquet(tmp_path / "x.parquet", rows, group=6)
    monkeypatch.setattr(parquet_table, "_BYTES", 18 * pq.ParquetFile(file).read_row_group(0, None).nbytes)  # less than half of all
    source = FilesSource(FilesConfig(path=str(file), sizes=((4, 4), (8, 4))), seed=0, batch_size=4)
    decoded.clear()
    drawn = [int(source[n]["caption"]) for n in range(240)]
    assert sorted(drawn) == list(range(240)) != drawn
    assert 22 <= len(decoded) <= 80
