"""Tar files as rows by number: webdataset's layout, odd names, and the index that is stored."""

import json
import tarfile

import pytest

from tests.data.containers import sample, write_tar
from xomni_jax.data import tar_index
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.data.tar_table import TarTable, column_names


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def table_of(tmp_path, *shards):
    return TarTable([write_tar(tmp_path / f"{n:05d}.tar", members) for n, members in enumerate(shards)], tmp_path)


def test_samples_are_numbered_in_the_order_of_the_tars(tmp_path):
    table = table_of(tmp_path, sample("b", text="one") + sample("a", text="zwölf"), sample("c", image=b"\x89PNG", suffix="png"))
    assert list(table) == [
        {"key": "b", "image": b"\xff\xd8", "text": "one"},
        {"key": "a", "image": b"\xff\xd8", "text": "zwölf"},
        {"key": "c", "image": b"\x89PNG", "text": "a sign"},
    ]
    assert table[1]["text"] == "zwölf"
    assert [table.where(n) for n in range(3)] == [f"{tmp_path}/00000.tar b", f"{tmp_path}/00000.tar a", f"{tmp_path}/00001.tar c"]
    assert table.notes == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path, form):
    names = ["./x.JPG", "a.b/x.jpg", "a.b/y.v1.0.png", "22.05.png", "ü/ö.webp", f"{'d' * 60}/{'k' * 60}.jpg"]
    table = TarTable([write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], form)], tmp_path)
    assert [row["key"] for row in table] == ["x", "a.b/x", "a.b/y", "22", "ü/ö", f"{'d' * 60}/{'k' * 60}"]
    assert [row["image"].decode() for row in table] == names


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (["jpg", "txt", "json"], ["image", "text", "json"]),
        (["webp", "text"], ["image", "text"]),
        (["v1.0.png"], ["image"]),
        (["2.txt"], ["text"]),
        (["input.jpg", "output.png", "txt"], ["input", "output", "text"]),
        (["mask.png", "txt"], ["mask", "text"]),
        (["1.jpg", "2.jpg", "3.jpg"], ["1", "2", "3"]),
        (["jpg", "mask.png"], ["image", "mask"]),
        (["jpg", "png"], ["jpg", "png"]),
        (["short.txt", "long.txt", "cls"], ["short", "long", "cls"]),
        (["input.jpg", "input.png"], ["input.jpg", "input.png"]),
        (["npy", "box.pth"], ["npy", "box.pth"]),
        (["meta.json"], ["meta"]),
    ],
)
def test_columns_of_fields(fields, columns):
    assert list(column_names(tuple(fields)).values()) == columns
    assert list(column_names(tuple(fields))) == fields


def test_columns_of_a_json_member_give_way_to_members(tmp_path):
    told = {"caption": "é", "width": 3, "image": "x.jpg", "key": "other", "more": [1, None]}
    members = [*sample("x"), ("x.json", json.dumps(told).encode()), ("y.json", b"[1]"), ("y.seg.json", b'{"a": 1}'), ("y.npy", b"\0")]
    table = table_of(tmp_path, members)
    assert table[0] == {"key": "x", "image": b"\xff\xd8", "text": "a sign", "caption": "é", "width": 3, "more": [1, None]}
    assert table[1] == {"key": "y", "json": [1], "seg": {"a": 1}, "npy": b"\0"}


def test_what_is_no_member_of_a_sample_is_counted(tmp_path):
    names = ["__meta__", "__meta__/index.json", "._x.jpg", "d/._y.jpg", ".hidden.jpg", "__MACOSX/z.jpg", "README"]
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name in [*names, "x.jpg"]:
            tar.addfile(tarfile.TarInfo(name))
        for name, kind in (("d", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x.jpg"
            tar.addfile(member)
    table = TarTable([file], tmp_path)
    assert [row["key"] for row in table] == ["x"]
    assert table.notes == [
        f"{file} ._x.jpg: AppleDouble file: ignored, as are 1 more",
        f"{file} .hidden.jpg: hidden file: ignored, as are 1 more",
        f"{file} README: name without an ending: ignored",
        f"{file} link.jpg: link or special file: ignored",
    ]


def test_members_that_lie_apart_are_one_sample(tmp_path):
    big = b"z" * 50_000
    table = table_of(tmp_path, [("a.jpg", b"1"), ("b.jpg", big), ("a.txt", b"of a"), ("b.txt", b"of b"), ("a.jpg", b"2")])
    assert list(table) == [
        {"key": "a", "image": b"1", "text": "of a"},
        {"key": "b", "image": big, "text": "of b"},
        {"key": "a", "image": b"2"},
    ]
    assert table.notes == [f"{tmp_path}/00000.tar 2 members lie apart from others of their key: they are one sample nevertheless"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", b"1"), ("a.JPG", b"2")], "it has two members jpg"),
        ([("a.txt", b"\xff\xfe")], "its member txt is no UTF-8 text"),
        ([("a.json", b"{")], "its member json is no JSON"),
    ],
)
def test_a_faulty_sample_keeps_its_number(tmp_path, members, reason):
    table = table_of(tmp_path, [*members, *sample("b")])
    with pytest.raises(FaultyRecord, match=f"^{tmp_path}/00000.tar a: {reason}"):
        table[0]
    assert table[1]["key"] == "b"


def test_a_tar_that_is_cut_in_a_member_gives_what_is_before(tmp_path):
    file = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)])
    file.write_bytes(file.read_bytes()[: 512 + 1024 + 512 + 300])
    table = TarTable([file], tmp_path)
    assert table[0]["image"] == b"1" * 600
    with pytest.raises(FaultyRecord, match=f"^{file} b: its member jpg is cut off"):
        table[1]
    assert table.notes == [f"{file} is cut off after b.jpg"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda data: data[: 512 + 1024], "is without an end mark, perhaps cut off after a.jpg"),
        (lambda data: data[: 512 + 1024 + 100], "is damaged after a.jpg"),
        (lambda data: data[: 512 + 1024] + b"?" * 512 + data[2048:], "is damaged after a.jpg"),
    ],
)
def test_the_end_of_a_tar_that_is_damaged_between_members_is_noted(tmp_path, change, note):
    file = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)])
    file.write_bytes(change(file.read_bytes()))
    table = TarTable([file], tmp_path)
    assert len(table) == 1
    assert table.notes == [f"{file} {note}"]


def test_statistics_of_img2dataset_tell_whether_a_tar_is_whole(tmp_path):
    shards = [sample("a"), [], [], sample("b") + sample("c"), sample("d")]
    files = [write_tar(tmp_path / f"{n:05d}.tar", members) for n, members in enumerate(shards)]
    files[2].write_bytes(b"")
    for n, successes in ((0, 1), (1, 0), (3, 5)):
        (tmp_path / f"{n:05d}_stats.json").write_text(json.dumps({"count": 9, "successes": successes}))
    table = TarTable(files, tmp_path)
    assert len(table) == 4
    assert table.notes == [
        f"{files[1]}: a tar of no samples",
        f"{files[2]}: 0 samples, and no 00002_stats.json beside it: an unfinished shard",
        f"{files[3]}: 2 samples, but 5 in 00003_stats.json",
        f"{files[4]}: 1 samples, and no 00004_stats.json beside it: an unfinished shard",
    ]


def indexed(monkeypatch):
    """Names of the files of which an index is made from now on."""
    made, make = [], tar_index._made
    monkeypatch.setattr(tar_index, "_made", lambda stream, nbytes: made.append(stream.name) or make(stream, nbytes))
    return made


def test_the_index_is_stored_beside_the_tar_until_that_changes(tmp_path, monkeypatch):
    made, file = indexed(monkeypatch), tmp_path / "x.tar"
    tables = [TarTable([write_tar(file, sample("a") + [("._b.jpg", b"")])], tmp_path), TarTable([file], tmp_path)]
    assert made == [str(file)]
    assert list(tables[0]) == list(tables[1])
    assert tables[0].notes == tables[1].notes != []
    assert tables[0].digest == tables[1].digest
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.index.npz", "x.tar"]
    changed = TarTable([write_tar(file, sample("b"))], tmp_path)  # of the same size
    assert (changed[0]["key"], len(made)) == ("b", 2)
    assert changed.digest != tables[0].digest
    (tmp_path / ".x.tar.index.npz").write_bytes(b"PK damaged")
    assert TarTable([file], tmp_path)[0]["key"] == "b"
    assert len(made) == 3


def test_the_index_is_stored_elsewhere_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    made, file = indexed(monkeypatch), write_tar(tmp_path / "x.tar", sample("a"))
    (tmp_path / ".x.tar.index.npz").mkdir()  # nothing can be written there, not even by root
    for _ in range(2):
        assert TarTable([file], tmp_path)[0]["key"] == "a"
    assert made == [str(file)]
    assert [p.suffix for p in (tmp_path / "home/.cache/xomni_jax/tars").iterdir()] == [".npz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.index.npz", "home", "x.tar"]


def test_a_full_disk_does_not_matter(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    assert table_of(tmp_path, sample("a"))[0]["key"] == "a"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "00000.tar"]
