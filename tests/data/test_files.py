"""Folders of images and files of records as sources: every layout, the faults of each in one sentence, batches of one size."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from xomni_jax.core.config import ConfigError
from xomni_jax.data.rendered import SIGNS
from xomni_jax.data.sources import batches

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200), "grey": (128, 128, 128)}


def write_images(folder, size=(64, 32)):
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", size, colour).save(folder / f"{name}.png")


def section(path, source="files", **options):
    return SIGNS.updated({"source": source, "path": str(path), "sizes": ((32, 64),)} | options, "config.data")


def examples(data, count=4):
    """The first `count` examples, by the number of their record."""
    return sorted((data.open(seed=0, batch_size=count)[n] for n in range(count)), key=lambda e: e["id"])


def beside_txt(folder):
    for name in COLOURS:
        (folder / f"{name}.txt").write_text(f"  a {name} cafe\u0301\n")


def beside_json(folder):
    for name in COLOURS:
        (folder / f"{name}.json").write_text(json.dumps({"caption": f"a {name} café", "width": 64}))


def metadata_jsonl(folder):
    rows = [{"file_name": f"{name}.png", "text": f"a {name} café"} for name in sorted(COLOURS)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)))


def metadata_csv(folder):
    with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("text", "file_name"), *((f"a {name} café", f"{name}.png") for name in sorted(COLOURS))])


@pytest.mark.parametrize("write", [beside_txt, beside_json, metadata_jsonl, metadata_csv])
def test_layouts_of_a_folder(tmp_path, write):
    write_images(tmp_path)
    write(tmp_path)
    found = examples(section(tmp_path))
    assert [e["caption"] for e in found] == [f"a {name} café" for name in sorted(COLOURS)]
    assert [e["id"] for e in found] == [f"{tmp_path.name}:{n}" for n in range(4)]
    for example, name in zip(found, sorted(COLOURS)):
        assert example["image"].shape == (32, 64, 3) and (example["image"] == COLOURS[name]).all()


@pytest.mark.parametrize("form", ["lines", "list"])
def test_json_lines_with_columns_of_their_own(tmp_path, form):
    write_images(tmp_path / "imgs" / "a")
    rows = [{"img": f"./a/{n}.png", "meta": {"Caption": n, "other": 1}, "question": "which?", "answer": n, "n": 1} for n in sorted(COLOURS)]
    rows[0]["img"] = str(tmp_path / "imgs" / "a" / f"{min(COLOURS)}.png")  # absolute, within `images`
    rows[1] |= {"targets": {"text": ["HI"]}}  # which the others lack
    text = json.dumps(rows) if form == "list" else "\n\n".join(map(json.dumps, rows))
    (tmp_path / "rows.json").write_text(text)
    data = section(tmp_path / "rows.json", image="img", caption="meta.Caption", images=str(tmp_path / "imgs"))
    found = examples(data)
    assert [(e["caption"], e["question"], e["answer"]) for e in found] == [(n, "which?", n) for n in sorted(COLOURS)]
    assert ["targets" in e for e in found] == [False, True, False, False]


def test_a_line_separator_inside_a_text_is_text(tmp_path):
    write_images(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "a\u2028b"}, ensure_ascii=False))
    assert examples(section(tmp_path / "a.jsonl"), 1)[0]["caption"] == "a\u2028b"


def test_images_are_scaled_to_cover_the_nearest_size(tmp_path):
    """Upright, the middle kept, every batch of one size, every image once in an epoch of whole batches."""
    halves = Image.fromarray(np.repeat([[[0, 0, 0]] * 50 + [[255, 255, 255]] * 50], 40, 0).astype(np.uint8))  # 100 x 40
    exif = Image.Exif()
    exif[0x0112] = 6
    for n in range(6):
        halves.save(tmp_path / f"wide{n}.png")
        halves.save(tmp_path / f"turned{n}.jpg", exif=exif, quality=100)  # stands upright
    for file in [*tmp_path.iterdir()]:
        file.with_suffix(".txt").write_text(file.stem)
    data = section(tmp_path, sizes=((32, 64), (64, 32)))
    taken = list(itertools.islice(batches(data, seed=1, batch_size=3), 8))
    epochs = [[(caption, b["image"].shape[1:3]) for b in part for caption in b["caption"]] for part in (taken[:4], taken[4:])]
    for epoch in epochs:
        assert len({caption for caption, _ in epoch}) == 12
        assert all(shape == ((32, 64) if "wide" in caption else (64, 32)) for caption, shape in epoch)
    assert epochs[0] != epochs[1]
    wide = next(b["image"][0] for b in taken if b["image"].shape[1:3] == (32, 64))
    assert (wide[:, :28] == 0).all() and (wide[:, 36:] == 255).all()
    upright = next(b["image"][0] for b in taken if b["image"].shape[1:3] == (64, 32))
    assert (upright[:28] < 9).all() and (upright[36:] > 246).all()


def test_order_depends_on_the_seed_and_is_repeated(tmp_path):
    write_images(tmp_path)
    beside_txt(tmp_path)
    order = lambda seed, prefetch=0: [b["id"] for b in itertools.islice(batches(section(tmp_path), seed, 2, prefetch=prefetch), 12)]
    assert order(0) == order(0, prefetch=2) and order(0) != order(1)
    few = list(itertools.islice(batches(section(tmp_path), 0, 6), 2))  # fewer images than a batch holds
    assert all(len(b["id"]) == 6 and set(b["id"]) == {f"{tmp_path.name}:{n}" for n in range(4)} for b in few)
    whole, row = (next(iter(batches(section(tmp_path), 0, 4, rows=rows)))["id"] for rows in (None, (2,)))
    assert row == whole[2:3]


def spoiled(folder, fault):
    """A good folder with one fault in it."""
    write_images(folder)
    metadata_jsonl(folder)
    lines = (folder / "metadata.jsonl").read_text("utf-8-sig").splitlines()
    row = json.loads(lines[1])
    if isinstance(fault, dict):
        lines[1] = json.dumps(row | fault)
    elif isinstance(fault, bytes):
        (folder / row["file_name"]).write_bytes(fault)
    else:
        lines[1] = fault
    (folder / "metadata.jsonl").write_text("\n".join(lines))


FAULTS = {
    "missing image": ({"file_name": "gone.png"}, r"gone.png cannot be read: No such file"),
    "no image": (b"<html>", r"green.png cannot be read: it is none of PNG"),
    "no image named": ({"file_name": None}, "no image: the column 'file_name' is empty"),
    "image of another kind": ({"file_name": 3}, "an image is int, neither a path nor encoded bytes"),
    "outside": ({"file_name": "../x.png"}, r"the image ../x.png lies outside"),
    "outside, hidden": ({"file_name": "a/../../x.png"}, "lies outside"),
    "absolute": ({"file_name": "/etc/passwd"}, "lies outside"),
    "web address": ({"file_name": "https://a.b/c.png"}, "is a web address, which is not fetched"),
    "empty caption": ({"text": " \n"}, "'text' holds no text"),
    "no caption": ({"text": None}, "no caption: the column 'text' is empty"),
    "caption of another kind": ({"text": 3}, "'text' holds no text"),
    "captions of another kind": ({"text": ["a", 3]}, "'text' holds no text"),
    "half a character": ({"text": "a\ud800"}, "'text' is not Unicode"),
    "question of another kind": ({"question": 3, "answer": "a"}, "'question' holds no text"),
    "targets of another kind": ({"targets": 3}, "'targets' is no object"),
    "not JSON": ("{nothing", "it is not JSON"),
    "null": ("null", "it is no object with named columns"),
    "nested too deep": ('{"text":' + "[" * 100_000, "it is not JSON"),
    "no object": ("[1]", "it is no object with named columns"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_record_is_refused_or_left_out(tmp_path, name, caplog):
    fault, words = FAULTS[name]
    spoiled(tmp_path, fault)
    with pytest.raises(ConfigError, match=rf"1 of 4 records cannot be used; the first: .*metadata.jsonl:2: .*{words}.*; repair") as error:
        section(tmp_path).open(0, 2)
    assert "\n" not in str(error.value)
    found = examples(section(tmp_path, skip_faulty=True), 3)
    assert [e["id"] for e in found] == [f"{tmp_path.name}:{n}" for n in (0, 2, 3)]  # numbers of the file
    assert "1 of 4 records cannot be used" in caplog.text


def test_a_cut_image_is_found_when_it_is_read_or_left_out_at_the_start(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    spoiled(tmp_path, b"")
    Image.fromarray(noise).save(tmp_path / "green.png")
    (tmp_path / "green.png").write_bytes((tmp_path / "green.png").read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"metadata.jsonl:2: the image .*green.png cannot be read: it is damaged or cut off"):
        examples(section(tmp_path))
    assert len(examples(section(tmp_path, skip_faulty=True), 3)) == 3


def empty(folder):
    pass


def only_text(folder):
    (folder / "a.txt").write_text("a")


def no_caption(folder):
    write_images(folder)
    beside_txt(folder)
    (folder / "red.txt").unlink()


def two_tables(folder):
    metadata_jsonl(folder)
    metadata_csv(folder)


def deeper(folder):
    (folder / "train").mkdir()
    metadata_csv(folder / "train")


def broken_csv(folder):
    (folder / "metadata.csv").write_text('file_name,text\na.png,"b" c"\n')


def latin(folder):
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,\xe9\n")


@pytest.mark.parametrize(
    "make, options, words",
    [
        (empty, {}, r"config.data.path=.*: holds no images; name files"),
        (only_text, {}, r"holds no images"),
        (no_caption, {}, r"1 of 4 records .*red.png: there is no red.txt or .json with its caption beside it"),
        (two_tables, {}, r"holds metadata.jsonl and metadata.csv; leave one of them"),
        (deeper, {}, r"train/metadata.csv lies deeper; name the folder that holds it"),
        (
            metadata_jsonl,
            {"caption": "captoin"},
            r"metadata.jsonl:1: no caption: config.data.caption='captoin' is no column; there are file_name, text",
        ),
        (
            metadata_csv,
            {"image": "file"},
            r"metadata.csv row 1: no image: config.data.image='file' is no column; there are text, file_name",
        ),
        (broken_csv, {}, r"metadata.csv line 2: .*; correct the quotes"),
        (latin, {}, r"metadata.csv cannot be read: byte 21 is not UTF-8"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, options, words):
    make(tmp_path)
    with pytest.raises(ConfigError, match=words):
        section(tmp_path, **options).open(0, 2)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"path": ""}, "config.data: path is empty; name a file"),
        ({"sizes": ()}, r"config.data: sizes=\(\) must hold one or more"),
        ({"sizes": ((0, 8),)}, "must hold one or more"),
        ({"pth": "a"}, "config.data.pth: unknown key; did you mean path"),
        ({"path": "/nowhere"}, "config.data.path=/nowhere: no such file or folder"),
        ({"source": "files", "path": "/nowhere.jsonl"}, "config.data.path=/nowhere.jsonl: no such file or folder"),
    ],
)
def test_options_that_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        section(**{"path": tmp_path} | options).open(0, 2)


def test_a_stage_says_what_the_data_lack(tmp_path):
    write_images(tmp_path)
    beside_txt(tmp_path)
    with pytest.raises(ConfigError, match="source=files: its examples have no question, answer, .* but only caption, id, image; add what"):
        batches(section(tmp_path), 0, 2, fields=("caption", "question", "answer"))
