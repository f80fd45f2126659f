"""xomni data inspect: counts, repeated images, the page; from a configuration, a folder of images and a folder of codes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_main import refusal
from tests.data.making import config, of_folder, write_images
from xomni_jax.cli.main import main
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import SIGNS
from xomni_jax.evaluation.data_page import difference_hash, look, reconstructions, tables
from xomni_jax.sampling.decoder import DECODER_COMPONENTS


@pytest.fixture
def images(tmp_path):
    """Twelve images: number 5 again as 13 in another format, a plain red and a plain blue one, and one that cannot be read."""
    folder = write_images(tmp_path / "images", 12)
    Image.open(folder / "005.png").save(folder / "013.jpg", quality=90)
    for n, colour in ((14, (200, 0, 0)), (15, (0, 0, 200))):
        Image.new("RGB", (64, 32), colour).save(folder / f"{n:03}.png")
    (folder / "016.png").write_bytes(b"x")
    for n in (13, 14, 15, 16):
        (folder / f"{n:03}.txt").write_text("a much longer caption, " * n)
    return folder


def test_what_is_counted_and_repeated(images, model_dir):
    found = look(config(model_dir, *of_folder(images)).data, 0, None, 3, 100)
    assert (found.total, len(found.keys), len(found.shown)) == (16, 15, 3)
    assert list(found.rejected) == [15] and "016.png" in found.rejected[15]
    assert [(found.captions[i], [found.keys[j] for j in same]) for i, same in found.repeated()] == [("image number 5", [12])]
    rows = tables(found)
    assert sum(int(row[1]) for row in rows["Tokens of a caption"][1:]) == sum(int(row[1]) for row in rows["Sizes"][1:]) == 15
    assert {row[0] for row in rows["Sizes"][1:]} == {"16x32 pixels", "32x16 pixels"}
    low, high = min(found.lengths), max(found.lengths)
    spans = [int(n) for row in rows["Tokens of a caption"][1:] for n in re.findall(r"\d+", row[0])]
    assert min(spans) == low and max(spans) >= high


def test_the_hash_tells_images_apart_and_survives_scaling():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96)) for _ in range(40)]
    hashes = np.array([difference_hash(np.asarray(image)) for image in images])
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert apart[~np.eye(40, dtype=bool)].min() > 4
    smaller = np.array([difference_hash(np.asarray(image.resize((70, 80)))) for image in images])
    assert np.bitwise_count(smaller ^ hashes).max() <= 4


class Grey:
    """A model whose codes are the rows of grey values of an image's cells, and which decodes them to these."""

    description = {"components": ("siglip_vq", *DECODER_COMPONENTS)}

    def encode_ragged(self, pixels):
        return [np.rint((x[::8, ::8, 0] + 1) * 127.5).astype(np.int32) for x in pixels]

    def decode(self, codes, prompts):
        assert len({c.shape for c in codes}) == 1 and len(prompts) == len(codes)
        return [Image.fromarray(c.astype(np.uint8)) for c in codes]


def test_reconstructions_come_from_the_codes(images, model_dir):
    """Of images and of their codes alike, in the order of the examples; without a decoder there is none."""
    shown = look(config(model_dir, *of_folder(images)).data, 0, None, 5, 5).shown
    codes = Grey().encode_ragged([to_pixels(e["image"]) for e in shown])
    by_code = [{"caption": e["caption"], "codes": c} for e, c in zip(shown, codes)]
    for made, other, code in zip(reconstructions(Grey(), shown), reconstructions(Grey(), by_code), codes, strict=True):
        assert np.array_equal(np.asarray(made), code) and np.array_equal(np.asarray(other), code)
    assert reconstructions(None, shown) == [None] * 5
    undecoded = Grey()
    undecoded.description = {"components": ("siglip_vq",)}
    assert reconstructions(undecoded, shown) == [None] * 5


def test_a_folder_from_the_command_line(images, tmp_path, capsys):
    page = tmp_path / "look.html"
    assert main(["data", "inspect", f"--config={images}", f"--out={page}", "--show=2"]) == 0
    told = capsys.readouterr().out
    assert "16 of 16 examples read: 1 cannot be used, 1 repeat an image" in told and "12: a much longer" in told
    html = page.read_text()
    assert html.count("<article>") == 2 and html.count("data:image/png;base64,") == 2 and "image number 1" in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_an_endless_source(capsys):
    found = look(SIGNS, 3, None, 1, 5)
    assert len(found.keys) == 5 and not found.rejected


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--config=/nowhere.py"], "/nowhere.py: no such config file"),
        (["--config={folder}", "--config.seed=1"], "--config.seed=1: belongs to a configuration; --config={folder} is a folder"),
        (["--config={folder}", "--read=0"], "--show 24 and --read 0 must be at least 0 and 1"),
        (["--config={folder}", f"--out={__file__}/page.html"], "give another folder"),
        (["--config={folder}"], "config.data.source=files: holds no records; name files that hold some"),
    ],
)
def test_what_is_wrong_is_told(arguments, told, tmp_path, capsys):
    arguments = [a.format(folder=tmp_path) for a in arguments]
    assert told.format(folder=tmp_path) in refusal(capsys, "data", "inspect", *arguments)
