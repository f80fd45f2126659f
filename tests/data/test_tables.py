"""Files of text and lists of files as tables: rows, their places and numbers, and what is wrong with a file in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from xomni_jax.core.config import ConfigError
from xomni_jax.data.kinds import KINDS, kind_of, open_parts
from xomni_jax.data.tables import FaultyRecord


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only(path):
    (part,) = open_parts(str(path))
    return part.table


def rows(table):
    return [table[n] for n in range(len(table))]


@pytest.mark.parametrize(
    "name, content, texts, last",
    [
        ("a.txt", "\ufeffone\r\n\n \ntwo\u2028still two\n", ["one", "two\u2028still two"], "a.txt:4"),
        ("a.txt", 'no newline, "one quote', ['no newline, "one quote'], "a.txt:1"),
        ("a.jsonl", '\ufeff{"text": "one"}\r\n\n"two"', ["one", "two"], "a.jsonl:3"),
        ("lines.json", '{"text": "one"}\n{"text": "two\u2028"}', ["one", "two\u2028"], "lines.json:2"),
        ("list.jsonl", ' \n[{"text": "one"},\n"two"]', ["one", "two"], "list.jsonl[1]"),
        ("a.csv", '\ufefftext,n\r\n"one, ""1""\nmore",007\nNA,\n', ['one, "1"\nmore', "NA"], "a.csv row 2"),
        ("a.tsv", "n\ttext\n1\tone, two\n", ["one, two"], "a.tsv row 1"),
    ],
)
def test_rows_of_text(tmp_path, name, content, texts, last):
    table = only(written(tmp_path / name, content))
    assert [row["text"] for row in rows(table)] == texts
    assert table.where(len(table) - 1) == str(tmp_path / last) and table.root == tmp_path
    assert name != "a.csv" or rows(table)[0]["n"] == "007"


def test_a_line_that_cannot_be_read_keeps_its_number(tmp_path):
    table = only(written(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": \n[1]\n{"text": "\xff"}\nnull\n{"text": "b"}'))
    faults = {}
    for n in range(len(table)):
        try:
            table[n]
        except FaultyRecord as fault:
            faults[n] = str(fault).replace(str(tmp_path), "")
    assert table[5] == {"text": "b"} and sorted(faults) == [1, 2, 3, 4]
    assert faults[1].startswith("/a.jsonl:2: it is not JSON (") and faults[2] == "/a.jsonl:3: it is no object with named columns"
    assert faults[3] == "/a.jsonl:4: it is not UTF-8 text"
    short = only(written(tmp_path / "a.csv", "text,n\na,1\nb\n"))
    with pytest.raises(FaultyRecord, match="a.csv row 2: it has 1 fields, the header has 2"):
        short[1]


def test_the_index_tells_contents_apart(tmp_path):
    one, same, other = (only(written(tmp_path / f"{n}.txt", text)).digest for n, text in enumerate(("a\nb", "a\nb", "a\nc")))
    assert one == same != other


def test_globs_and_lists_keep_their_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/1.jsonl", "c.txt"):
        written(tmp_path / name, f'"{name}"' if name.endswith("jsonl") else name)
    found = open_parts([str(tmp_path / "c.txt"), str(tmp_path / "*" / "*")])
    assert [part.table[0]["text"] for part in found] == ["c.txt", "a/1.jsonl", "b/10.txt", "b/2.txt"]
    assert [part.name for part in found] == ["c", "1", "10", "2"]
    assert open_parts(str(written(tmp_path / "d[1].txt", "odd")))[0].table[0] == {"text": "odd"}


def test_folders(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    written(tmp_path / "a.txt", "beside")
    written(tmp_path / ".hidden.png", "x")
    assert rows(only(tmp_path)) == [{"file_name": "a.png", "text": "beside"}]
    written(tmp_path / "metadata.jsonl", '{"file_name": "b.png", "text": "b"}')
    assert only(tmp_path).notes == [f"{tmp_path / 'a.png'}: an image without metadata"]
    assert only(written(tmp_path / "e" / "x.txt", "").parent).notes == [f"{tmp_path / 'e'}: holds no images"]


def test_pairs_with_seeds(tmp_path):
    written(tmp_path / "a" / "prompt.json", '{"edit": "redden"}')
    table = only(written(tmp_path / "seeds.json", '[["a", [3, 4]], ["b", [5]], ["c", []]]'))
    assert table[1] == {"id": "a/4", "text": "redden", "input": "a/4_0.jpg", "output": "a/4_1.jpg"}
    with pytest.raises(FaultyRecord, match="b/5: prompt.json cannot be read .No such file"):
        table[2]
    with pytest.raises(FaultyRecord, match="c: there are no seeds"):
        table[3]
    with pytest.raises(ConfigError, match="seeds.json is no list of names"):
        only(written(tmp_path / "seeds.json", "[1]"))


# ---- lists of files ----
def listed(folder, text):
    for name, count in (("a.txt", 5), ("b.txt", 2)):
        written(folder / name, "\n".join(f"{name} {n}" for n in range(count)))
    return str(written(folder / "mix.yaml", text))


def test_weights_of_a_list(tmp_path):
    entries = "datasets: [{path: a.txt, rewards: [{ocr: 0.5}, {clip: 1}]}, {name: second, path: b.txt, sample_weight: 5}]"
    a, b = open_parts(listed(tmp_path, entries))
    assert (a.weight, b.weight, b.name, a.rewards, b.rewards) == (1, 5, "second", {"ocr": 0.5, "clip": 1.0}, {})
    a, b = open_parts(listed(tmp_path, entries + "\nsampling_mode: weight_only"))
    assert (a.weight * 5, b.weight * 2) == (1, 5)  # of all records of each


@pytest.mark.parametrize(
    "strategy, chosen", [("all", [0, 1, 2, 3, 4]), ("first:2", [0, 1]), ("end:30%", [3, 4]), ("first:9", [0, 1, 2, 3, 4]), ("end:0", [])]
)
def test_strategies_of_a_list(tmp_path, strategy, chosen):
    (part,) = open_parts(listed(tmp_path, f"datasets: [{{json_path: a.txt, sampling_strategy: '{strategy}'}}]"))
    assert list(part.rows) == chosen


def test_a_random_strategy_is_the_same_on_every_host(tmp_path):
    path = listed(tmp_path, "datasets: [{json_path: a.txt, sampling_strategy: 'random:60%'}]")
    (one,), (two,) = open_parts(path), open_parts(path)
    assert list(one.rows) == list(two.rows) == sorted(set(one.rows)) and len(one.rows) == 3


# ---- what is refused ----
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.bin", b"\0\1", "a.bin: files of this kind are not read; xomni data kinds lists"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a.jsonl is a pointer of git-lfs"),
        ("a.json", '[{"text": "a"},\n', "a.json is no list in JSON"),
        ("a.csv", 'text\n"a" b"\n', "a.csv line 2: .*; correct the quotes"),
        ("a.csv", b"text\n\xe9\n", "a.csv cannot be read: byte 5 is not UTF-8; save it as UTF-8"),
        ("a.csv", "file_name;text\na.png;a\n", "a.csv: its columns are separated by ';'; separate them by commas"),
        ("a.csv", "text,n,text\na,1,b\n", "a.csv: the header has the column 'text' twice"),
        ("a.yaml", "datasets: [", "a.yaml is not YAML"),
        ("a.yaml", "sources: []", "a.yaml has no list `datasets`"),
        ("a.yaml", "{sampling_mode: some, datasets: [{path: a}]}", "sampling_mode='some' is unknown"),
        ("a.yaml", "datasets: [{name: a}]", r"datasets\[0\] names no file"),
        ("a.yaml", "datasets: [{path: a.txt, sample_weight: 0}]", "sample_weight=0 must be a positive number"),
        ("a.yaml", "datasets: [{path: a.txt}]", "a.txt: no such file or folder"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        open_parts(str(written(tmp_path / name, content)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "entry, words", [("rewards: {a: b}", "rewards must be a list"), ("sampling_strategy: some:2", "sampling_strategy='some:2'")]
)
def test_entries_of_a_list_that_are_refused(tmp_path, entry, words):
    with pytest.raises(ConfigError, match=words):
        open_parts(listed(tmp_path, f"datasets: [{{path: a.txt, {entry}}}]"))


def test_paths_that_lead_to_nothing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config.data.path=.*\*.txt: no file fits this; correct it"):
        open_parts(str(tmp_path / "*.txt"))
    file = written(tmp_path / "a.txt", "a")
    monkeypatch.setattr(type(file), "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, os.strerror(13))))
    with pytest.raises(ConfigError, match="a.txt cannot be read: Permission denied"):
        open_parts(str(file))


def test_every_kind_is_told_by_its_example():
    """The example of the documentation leads to the kind that it stands for, where the name alone tells it."""
    for name in set(KINDS) - {"images", "tfds"}:
        assert next(kind for kind, entry in KINDS.items() if entry.fits(Path(KINDS[name].example), b"")) == name
    assert kind_of(Path(__file__).parent) == "images"
