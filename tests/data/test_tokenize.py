"""xomni data tokenize: every image once, exact counts, what cannot be used listed, shards that are kept and redone."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.cli.test_main import refusal
from tests.cli.test_train import MINIATURE
from tests.data.making import make_codes, of_folder, write_images
from tests.miniature import ROOT
from xomni_jax.core.config import ConfigError
from xomni_jax.data.codes import CodesConfig, CodesSource
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.training import tokenize_data
from xomni_jax.training.tokenize_data import TokenizeConfig, TooManyRejected, loaded


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 images, of which three cannot be used: no image, cut off, without a caption."""
    folder = write_images(tmp_path_factory.mktemp("images"), 30)
    (folder / "003.png").write_bytes(b"<html>")
    (folder / "017.png").write_bytes((folder / "016.png").read_bytes()[:60])
    (folder / "020.txt").write_text(" \n")
    return folder


@pytest.fixture(scope="module")
def codes(images, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "codes"
    assert make_codes(model_dir, of_folder(images), out) == f"27 examples in 3 shards, 393 KB, 3 rejected (listed in rejected.jsonl): {out}"
    return out


def test_every_image_once_with_the_codes_of_the_model(images, codes, model_dir):
    records = CodesSource.epoch(CodesConfig(str(codes)))
    model = xomni_jax.load(model_dir)
    assert {e["caption"] for e in map(records.__getitem__, range(27))} == {f"image number {n}" for n in range(30) if n not in (3, 17, 20)}
    for example in (records[0], records[20]):
        number = int(example["caption"].split()[-1])
        image = np.asarray(
            Image.open(images / f"{number:03}.png").resize(example["codes"].shape[::-1] * np.array(8), Image.Resampling.BICUBIC)
        )
        expected = np.asarray(model.encode_pixels(to_pixels(image[None])))[0]
        assert example["codes"].dtype == np.uint16 and (example["codes"] == expected).mean() > 0.9  # another batch may round another way
        assert set(example) == {"id", "caption", "captions", "codes"}


def test_the_index_counts_exactly(codes):
    index = json.loads((codes / "index.json").read_text())
    assert (index["records"], index["examples"], index["rejected"]) == (30, 27, 3)
    assert index["sizes"] == [[16, 32, 14], [32, 16, 13]]
    assert [shard["records"] for shard in index["shards"]] == [11, 10, 6]
    assert [shard["file"] for shard in index["shards"]] == [f"codes-{n:05}-of-00003.array_record" for n in range(3)]
    for shard in index["shards"]:
        data = (codes / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert sum(count for *_, count in shard["sizes"]) == shard["records"]


def test_what_cannot_be_used_is_listed_with_place_and_reason(codes):
    lines = [json.loads(line) for line in (codes / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [3, 17, 20]
    for line, words in zip(lines, (("003.png", "it is none of PNG"), ("017.png", "damaged or cut off"), ("020.png", "holds no text"))):
        assert all(word in line["reason"] for word in words)


def test_lost_shards_are_made_again_and_others_are_kept(images, codes, model_dir, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(codes, out)
    cut, sign = out / "codes-00000-of-00003.array_record", out / "codes-00002-of-00003.json"
    cut.write_bytes(cut.read_bytes()[:1000])
    sign.unlink()
    (out / ".codes-00002-of-00003.array_record.host.1").write_bytes(b"left by a killed process")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("codes-00001-*")}
    make_codes(model_dir, of_folder(images), out)
    assert contents(out) == contents(codes)
    assert kept == {path.name: path.stat().st_mtime_ns for path in out.glob("codes-00001-*")}


def test_processes_share_the_shards(images, codes, model_dir, tmp_path):
    """Each without the others; whoever finishes the last shard writes the same index as one process does."""
    out = tmp_path / "codes"
    assert "2 of 3 shards are finished" in make_codes(model_dir, of_folder(images), out, 0, 2)
    assert not (out / "index.json").exists()
    assert "27 examples in 3 shards" in make_codes(model_dir, of_folder(images), out, 1, 2)
    assert contents(out) == contents(codes)


@pytest.mark.parametrize("text, limit", [("3", 3), ("0", 0), ("10%", 3), ("0.5%", 0.15), ("100%", 30)])
def test_limits_of_rejected_records(text, limit):
    assert TokenizeConfig("out", max_rejected=text).limit(30) == pytest.approx(limit)


def test_too_many_rejected_records_stop_the_job(images, codes, model_dir, tmp_path):
    out = tmp_path / "codes"
    told = rf"3 records cannot be used, --max-rejected 9% allows fewer; {out}/rejected.jsonl lists them, the last: .*020.*holds no text"
    with pytest.raises(TooManyRejected, match=told):
        make_codes(model_dir, of_folder(images), out, max_rejected="9%")
    assert (out / "rejected.jsonl").read_bytes() == (codes / "rejected.jsonl").read_bytes() and not (out / "index.json").exists()
    make_codes(model_dir, of_folder(images), out, max_rejected="3")  # goes on where it stopped
    assert contents(out) == contents(codes)


def test_a_shard_of_nothing_but_rejected_records(model_dir, tmp_path):
    folder = write_images(tmp_path / "images", 6)
    for n in range(2, 4):
        (folder / f"{n:03}.png").write_bytes(b"")
    out = tmp_path / "codes"
    make_codes(model_dir, of_folder(folder), out, shard=2, max_rejected="50%")
    assert [shard["records"] for shard in json.loads((out / "index.json").read_text())["shards"]] == [2, 0, 2]
    assert len(CodesSource.epoch(CodesConfig(str(out)))) == 4


OWN = '''
import numpy as np
from dataclasses import dataclass


class Odd:
    """Images of a size that is none of the configured ones."""

    @dataclass(frozen=True)
    class Options:
        """Sizes.

        Attributes:
          sizes: (height, width)
        """

        sizes: tuple[tuple[int, int], ...] = ((16, 32),)

    def __init__(self, options, seed, batch_size):
        pass

    def __len__(self):
        return 4

    def __getitem__(self, n):
        return {"id": str(n), "caption": "c", "image": np.zeros((16, 32 if n else 24, 3), np.uint8)}
'''


def test_a_source_of_ones_own(model_dir, tmp_path):
    (tmp_path / "odd.py").write_text(OWN)
    data = f"source={tmp_path / 'odd.py'}:Odd", "sizes=((16,32),)"
    assert "3 examples in 1 shards" in make_codes(model_dir, data, tmp_path / "codes", max_rejected="1")
    assert "an image of 16x24 pixels, which is none of config.data.sizes" in (tmp_path / "codes" / "rejected.jsonl").read_text()


@pytest.fixture
def command(tmp_path, images, model_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "small.py").write_text(MINIATURE.format(file="sft", run_dir="none", init_from=model_dir))
    return [f"--config={tmp_path / 'small.py'}", *(f"--config.data.{o}" for o in of_folder(images)), f"--out={tmp_path / 'out'}"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--max-rejected=many"], "--max-rejected many: give a number of records, such as 100, or a share of them, such as 1%"),
        (["--batch=0"], "--batch 0 must be at least 1"),
        (["--config.init_from="], "config.init_from is empty; stage data tokenize needs a model directory with siglip_vq"),
        (["--config.init_from=/nowhere"], "/nowhere: no such directory; give a model directory"),
        (["--config.data.path=/nowhere"], "config.data.path=/nowhere: no such file or folder"),
        (["--config.data.sizes=((16,33),)"], "16x33 pixels are not whole 8x8 tokens"),
        (["--config.data.source=rendered", "--config.data.sizes=((32,64),)"], "config.data.source=rendered: its examples have no end"),
        (["--out={model}"], "holds a model directory; name another folder"),
        (["--out=/proc/x"], "nothing can be written there"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(command, arguments, told, model_dir, tmp_path, capsys):
    if "rendered" in arguments[0]:
        command = [c for c in command if ".path" not in c]
    arguments = [a.format(model=model_dir) for a in arguments]
    assert told in refusal(capsys, "data", "tokenize", *command, *arguments)
    assert not (tmp_path / "out").exists()


def test_another_job_in_the_same_folder_is_refused(images, codes, model_dir):
    before = contents(codes)
    with pytest.raises(ConfigError, match=r"was begun with batch=1, now it is 2; name another folder"):
        make_codes(model_dir, of_folder(images), codes, batch=2)
    with pytest.raises(ConfigError, match=r"was begun with data.sizes=.*; name another folder"):
        make_codes(model_dir, of_folder(images, "((16,32),)"), codes)
    assert contents(codes) == before


def test_files_that_have_changed_are_told(model_dir, tmp_path):
    folder = write_images(tmp_path / "images", 3)
    make_codes(model_dir, of_folder(folder), tmp_path / "codes")
    (folder / "001.png").rename(folder / "009.png")
    (folder / "001.txt").rename(folder / "009.txt")
    with pytest.raises(ConfigError, match=r"was begun with digest='\w+', now it is '\w+'; name another folder"):
        make_codes(model_dir, of_folder(folder), tmp_path / "codes")


def test_a_full_disk_is_told_and_leaves_nothing_half_written(images, codes, model_dir, tmp_path, monkeypatch):
    out = tmp_path / "codes"
    part = tmp_path / "part"
    part.symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_data, "part_of", lambda path: part)
        with pytest.raises(OSError, match=r"a shard cannot be written \(.*No space left on device\); mend that, the same command goes on"):
            make_codes(model_dir, of_folder(images), out)
    assert [path.name for path in out.iterdir()] == ["source.json"] and not part.is_symlink()
    make_codes(model_dir, of_folder(images), out)
    assert contents(out) == contents(codes)


def test_records_that_codes_cannot_hold_are_rejected_with_their_reason():
    image = np.zeros((16, 32, 3), np.uint8)
    talk = {"image": image, "images": [image, image], "turns": [("user", "<image 0><image 1>?"), ("assistant", "!")]}
    records = [{"caption": "a"}, talk, talk | {"images": [image]}]
    reasons = [reason for *_, reason in loaded(records, [(16, 32)], [SimpleNamespace(keys=range(3))], 1)]
    assert reasons[0] == "it has no image" and "shows several images" in reasons[1] and reasons[2] == ""


def test_images_of_excluded_captions_do_not_become_codes(model_dir, tmp_path):
    folder = write_images(tmp_path / "images", 4)
    (tmp_path / "benchmark.txt").write_text((folder / "002.txt").read_text().upper() + "\n")
    options = [*of_folder(folder), f"exclude=('{tmp_path / 'benchmark.txt'}',)"]
    assert make_codes(model_dir, options, tmp_path / "codes", max_rejected="1").startswith("3 examples in 1 shards")
    assert "which config.data.exclude names" in (tmp_path / "codes" / "rejected.jsonl").read_text()
